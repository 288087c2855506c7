"""Whatever shards the model, what is saved is loaded: anywhere, bitwise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.accelerate.harness import assert_same, batches, make, on_ranks, state_of, train

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
