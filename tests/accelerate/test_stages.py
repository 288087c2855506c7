"""Whatever shards the model, what is saved is loaded: anywhere, bitwise."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from tests.accelerate.harness import Net, assert_same, batches, make, on_ranks, state_of, train
from zero_ckpt.accelerate import attach

KINDS: list[Any] = ["plain", 0, 1, 2, 3, "fsdp2"]


def saved(folder: str, kind: Any) -> dict[str, Any]:
    made = make(kind)
    train(made, batches(3))
    made[0].save_state(folder, client_state={"epoch": 1})
    return state_of(made)


def resumed(folder: str, kind: Any) -> dict[str, Any]:
    warnings.filterwarnings("ignore", ".*was saved by|AcceleratedScheduler makes", UserWarning)
    made = make(kind, seed=7)
    assert made[0].load_state(folder) == {"epoch": 1}
    return state_of(made)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: Any, tmp_path: Path) -> None:
    for first, second in on_ranks(interrupted_and_not, 2, str(tmp_path), kind):
        assert_same(first, second)


def interrupted_and_not(folder: str, kind: Any) -> tuple[Any, Any]:
    made = make(kind)
    train(made, batches(3))
    made[0].save_state(folder)
    going_on = train(made, batches(3, 3)), state_of(made)
    made[0].load_state(folder)
    back = train(made, batches(3, 3)), state_of(made)
    return going_on, back


@pytest.mark.parametrize(
    ("kind", "other", "world_size", "other_size"),
    [
        (0, 3, 2, 2),
        (1, "fsdp2", 2, 1),
        (3, 1, 2, 2),
        ("fsdp2", 2, 2, 2),
        (2, "plain", 2, 1),
        ("plain", 3, 1, 3),
    ],
)
def test_another_stage_and_world_size_loads_it(
    kind: Any, other: Any, world_size: int, other_size: int, tmp_path: Path
) -> None:
    before = on_ranks(saved, world_size, str(tmp_path), kind)[0]
    for after in on_ranks(resumed, other_size, str(tmp_path), other):
        missing = before["weights"].keys() - after["weights"].keys()
        assert all(key.startswith("norm.") for key in missing)
        assert_same({key: before["weights"][key] for key in after["weights"]}, after["weights"])
        assert_same({**before, "weights": {}}, {**after, "weights": {}})


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_that_cannot_step_on_parts_names_the_stage_that_can(stage: int) -> None:
    on_ranks(step_on_parts, 2, stage)


def step_on_parts(stage: int) -> None:
    for mine in (stage, 1):
        accelerator = attach(Accelerator(cpu=True), stage=mine)
        model = Net()
        own = torch.optim.Rprop([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(own, 1, 0.5)
        made = (accelerator, *accelerator.prepare(model, own, scheduler))
        if mine == stage:
            assert isinstance(pickle.loads(pickle.dumps(made[2])), AcceleratedOptimizer)
            told = r"(?s)strategy.*Rprop cannot step on .*Attach with stage=1, where"
            with pytest.raises(RuntimeError, match=told):
                train(made, batches(1))
            accelerator.free_memory()
        else:
            train(made, batches(1))
