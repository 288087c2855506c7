"""What goes into a save comes back from a load, exactly and alone, and each rank's own to that rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.contract.models import STAGES, Net, adamw, shard, train, weights
from tests.workers import run_ranks
from zero_ckpt import Checkpointer, load_checkpoint, save_checkpoint
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import ConfigurationError, UnsafeObjectError

WORLD = 2

OURS = (
    "client_state",
    "rng",
    "optimizers",
    "lr_schedulers",
    "extra_state",
    "global_step",
    "accelerate",
)
THEIRS = ("lr_scheduler", "module", "dp_world_size", "global_steps", "state_dict", "loops")


# Tags


@pytest.mark.parametrize(
    ("tag", "name"),
    [(None, "global_step7"), (12, "12"), ("best", "best"), ("epoch=0-step=1.ckpt", "epoch=0-step=1.ckpt"), ("ü", "ü")],
)  # fmt: skip
def test_a_tag_is_a_string_a_number_or_the_step(tag: Any, name: str, tmp_path: Path) -> None:
    with Checkpointer(Net()) as checkpointer:
        handle = checkpointer.save_checkpoint(tmp_path, tag, step=7)
    assert (handle.tag, handle.path) == (name, str(tmp_path / name))
    assert (tmp_path / "latest").read_text().strip() == name
    assert load_checkpoint(tmp_path, Net(), tag=tag or name).path == str(tmp_path / name)


@pytest.mark.parametrize(
    "tag", ["", ".", "..", "a/b", "a\\b", "latest", "a\nb", "a\0b", " a", "-a"]
)
def test_a_tag_that_a_path_would_misread_is_refused(tag: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be a folder's name"):
        save_checkpoint(tmp_path / "new", Net(), tag=tag)
    assert not (tmp_path / "new").exists()


# Client state


class Odd:
    """Something that only a pickle can hold."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd)

    __hash__ = None  # type: ignore[assignment]


def _state(rank: int) -> dict[Any, Any]:
    """Nested, and with every key that somebody might take for one of the package's."""
    return {
        **{key: {"mine": rank} for key in (*OURS, *THEIRS)},
        3: [(1, 2.5), {"a", "b"}, None, b"raw", 2**80],
        "tensor": torch.arange(3) + rank,
        "array": np.arange(2.0),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and a.tolist() == b.tolist()
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def _save_and_load_states(directory: str, stage: int) -> None:
    rank = dist.get_rank()
    model, optimizer = shard(stage)
    train(model, optimizer)
    with Checkpointer(model, optimizer) as checkpointer:
        checkpointer.save_checkpoint(
            directory, "t", _state(rank), per_rank_client_state=_state(10 + rank)
        )
        for options in ({}, {"load_module_only": True}):
            result = checkpointer.load_checkpoint(directory, **options)
            assert _same(result.client_state, _state(0))
            assert _same(result.per_rank_client_state, _state(10 + rank))
        checkpointer.save_checkpoint(directory, "none", 5)
        result = checkpointer.load_checkpoint(directory)
        assert tuple(result) == (f"{directory}/none", 5)
        assert result.per_rank_client_state is None


@pytest.mark.parametrize("stage", STAGES)
def test_client_states_come_back_exactly_and_alone(stage: int, tmp_path: Path) -> None:
    run_ranks(_save_and_load_states, WORLD, str(tmp_path), stage)


def _load_at_another_size(directory: str) -> None:
    model, optimizer = shard(3)
    with Checkpointer(model, optimizer, rng=False) as checkpointer:
        if dist.get_rank():
            result = checkpointer.load_checkpoint(directory, "t")
        else:
            with pytest.warns(UserWarning, match="saved by 2 ranks and is loaded by 3: nobody"):
                result = checkpointer.load_checkpoint(directory, "t")
    assert _same(result.client_state, _state(0))
    assert result.per_rank_client_state is None


def test_no_rank_gets_anothers_client_state_at_another_world_size(tmp_path: Path) -> None:
    run_ranks(_save_and_load_states, WORLD, str(tmp_path), 3)
    run_ranks(_load_at_another_size, 3, str(tmp_path))


def test_a_pickled_value_of_one_rank_opens_only_when_that_is_allowed(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"stored as pickles: 'rank_objects/client_state/0' \(.*Odd"
    ):
        save_checkpoint(tmp_path, Net(), step=1, per_rank_client_state=[Odd()])
    with pytest.raises(UnsafeObjectError, match="Odd"):
        load_checkpoint(tmp_path, Net())
    result = load_checkpoint(tmp_path, Net(), weights_only=False)
    assert result.per_rank_client_state == [Odd()]


# Frozen parameters


class Adapted(nn.Module):
    """A large frozen base and small trainable matrices, as LoRA has them."""

    def __init__(self, seed: int, base: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(256, 256)
        nn.init.constant_(self.base.weight, base)
        self.base.requires_grad_(False)
        self.hidden, self.head = nn.Linear(256, 2, bias=False), nn.Linear(2, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.repeat(1, 64)
        result: torch.Tensor = self.base(wide) + self.head(self.hidden(wide))
        return result


def _save_adapted(directory: str, stage: int) -> dict[str, torch.Tensor]:
    model, optimizer = shard(stage, make=lambda seed: Adapted(seed, 1.0))
    train(model, optimizer)
    with Checkpointer(model, optimizer) as checkpointer:
        checkpointer.save_checkpoint(directory, "full")
        checkpointer.save_checkpoint(directory, "small", exclude_frozen_parameters=True)
    return weights(model)


def _load_adapted(directory: str, stage: int) -> tuple[Any, ...]:
    model, optimizer = shard(stage, seed=1, make=lambda seed: Adapted(seed, 2.0))
    with Checkpointer(model, optimizer, rng=False) as checkpointer:
        result = checkpointer.load_checkpoint(directory, "small")
    train(model, optimizer)
    return result.report, weights(model)


@pytest.mark.parametrize("stage", STAGES)
def test_without_frozen_parameters_a_checkpoint_is_small_and_loads_strictly(
    stage: int, tmp_path: Path
) -> None:
    saved = run_ranks(_save_adapted, WORLD, str(tmp_path), stage)[0]
    small, full = (
        sum(file.stat().st_size for file in (tmp_path / tag).glob("model-*"))
        for tag in ("small", "full")
    )
    assert small < full - 256 * 256 * 4
    assert open_checkpoint(tmp_path, "small").manifest.excluded == ["base.bias", "base.weight"]
    for report, loaded in run_ranks(_load_adapted, WORLD, str(tmp_path), 3 - stage):
        assert (report.missing, report.unexpected) == ((), ())
        assert set(report.excluded) == {"base.weight", "base.bias"}
        assert bool((loaded["base.weight"] == 2).all())  # the model's own
        assert not torch.equal(loaded["head.weight"], saved["head.weight"])  # trained on


def test_optimizer_state_of_the_rest_is_all_there(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, step=1, exclude_frozen_parameters=True)
    live = Net(1)
    again = adamw(live)
    load_checkpoint(tmp_path, live, again)
    assert _same(again.state_dict()["state"], optimizer.state_dict()["state"])
