"""Any stage, world size, precision, order and grouping to any other: every value exactly, and it trains on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.contract.models import STAGES, train, weights, whole
from tests.workers import run_ranks
from zero_ckpt import (
    Checkpointer,
    get_fp32_state_dict_from_zero_checkpoint,
    load_checkpoint,
    save_checkpoint,
    zero,
)
from zero_ckpt.core.naming import innermost

PARTS = ["first", "second", "scalar", "turned", "nothing", "alone", "frozen"]


class Odd(nn.Module):
    """Parameters that ZeRO engines stumble on: of no dimension, of no element, transposed, frozen, in no optimizer."""

    def __init__(self, order: list[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for part in order:
            self.add(part)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def add(self, part: str) -> None:
        if part in ("first", "second"):
            self.add_module(part, nn.Linear(4, 5) if part == "first" else nn.Linear(5, 3))
        else:
            self.register_parameter(part, nn.Parameter(self.tensor(part), part != "frozen"))

    def tensor(self, part: str) -> torch.Tensor:
        shapes = {"scalar": (), "nothing": (0, 3), "alone": (7,), "frozen": (2, 3)}
        return torch.randn(3, 5).t() if part == "turned" else torch.randn(shapes[part])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = self.get_parameter("turned")
        hidden = torch.tanh(self.get_submodule("first")(x))
        self.get_buffer("seen").add_(1)
        kept = self.get_parameter("nothing").sum() + self.get_parameter("frozen").sum()
        rest = self.get_parameter("alone").sum() * 0.01 + kept
        result: torch.Tensor = (
            self.get_submodule("second")(hidden) * self.get_parameter("scalar")
            + hidden @ turned
            + rest
        )
        return result


def _job(stage: int, order: list[str], seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """The model, and an optimizer whose groups follow `order`: all but `alone`."""
    net = Odd(order, seed).to(dtype)
    if stage >= 2:
        mesh = zero.make_mesh(dist.get_world_size(), None, "cpu")
        zero.shard_module(net, stage=stage, mesh=mesh)
    model: nn.Module = net if stage >= 2 else nn.parallel.DistributedDataParallel(net)
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad and n != "alone"]
    large = [p for n, p in named if n.endswith("weight") or n == "turned"]
    small = [p for n, p in named if not (n.endswith("weight") or n == "turned")]
    parts = [
        {"params": large, "lr": 0.02, "weight_decay": 0.1},
        {"params": small, "lr": 0.04, "weight_decay": 0.0},
    ]
    groups = parts if order == PARTS else parts[::-1]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    return model, zero.partition_optimizer(optimizer) if stage == 1 else optimizer


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state by parameter, gathered from all ranks."""
    names = {id(p): name for name, p in innermost(model).named_parameters()}
    holder = getattr(optimizer, "optim", optimizer)
    mine = {
        f"{names[id(p)]}/{key}": whole(value)
        for p, state in holder.state.items()
        for key, value in state.items()
    }
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def _rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in innermost(model).named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _save_all(directory: str) -> dict[int, Any]:
    """A checkpoint of each stage, and one before the first step."""
    found = {}
    for stage in STAGES:
        model, optimizer = _job(stage, PARTS, seed=0)
        with Checkpointer(model, optimizer) as checkpointer:
            checkpointer.save_checkpoint(directory, f"new{stage}")
            train(model, optimizer, 2)
            checkpointer.save_checkpoint(directory, f"stage{stage}")
        found[stage] = weights(model), _moments(model, optimizer), _rates(model, optimizer)
    return found


def _load_all(directory: str, stage: int) -> dict[int, Any]:
    found = {}
    for saved in STAGES:
        model, optimizer = _job(stage, PARTS[::-1], seed=1)
        with Checkpointer(model, optimizer, rng=False) as checkpointer:
            checkpointer.load_checkpoint(directory, f"new{saved}")
            assert not _moments(model, optimizer)
            checkpointer.load_checkpoint(directory, f"stage{saved}")
        state = weights(model), _moments(model, optimizer), _rates(model, optimizer)
        found[saved] = state
        train(model, optimizer)
    return found


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, Any]]:
    directory = str(tmp_path_factory.mktemp("stages"))
    return directory, run_ranks(_save_all, 2, directory)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_loads_every_stage_at_another_size_in_another_order(
    stage: int, saved: tuple[str, dict[int, Any]]
) -> None:
    directory, expected = saved
    for found in run_ranks(_load_all, 3, directory, stage):
        for begun, (weights_, moments, rates) in expected.items():
            _same(found[begun][0], weights_)
            _same(found[begun][1], moments)
            assert found[begun][2] == rates, begun


@pytest.mark.parametrize("stage", STAGES)
def test_the_fp32_weights_hold_what_no_optimizer_has_at_every_stage(
    stage: int, saved: tuple[str, dict[int, Any]]
) -> None:
    directory, expected = saved
    found = get_fp32_state_dict_from_zero_checkpoint(directory, f"stage{stage}")
    _same(dict(found), expected[stage][0])


# Precision


def _mixed(stage: int, precision: str, seed: int) -> Any:
    """fp32 weights, computing in `precision`."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    if stage >= 2:
        mesh = zero.make_mesh(dist.get_world_size(), None, "cpu")
        policy = zero.mixed_precision_policy(precision, autocast=False)
        zero.shard_module(net, stage=stage, mesh=mesh, mixed_precision=policy)
    model: nn.Module = net if stage >= 2 else nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    return model, zero.partition_optimizer(optimizer) if stage == 1 else optimizer


MIXED = [(3, "bf16-mixed"), (2, "16-mixed"), (1, "32-true")]


def _save_mixed(directory: str) -> list[Any]:
    found = []
    for stage, precision in MIXED:
        model, optimizer = _mixed(stage, precision, 0)
        train(model, optimizer, 2)
        save_checkpoint(directory, model, optimizer, tag=precision, step=2)
        found.append((weights(model), _moments(model, optimizer)))
    return found


def _load_mixed(directory: str) -> list[list[Any]]:
    found = []
    for stage, precision in MIXED:
        row = []
        for _, begun in MIXED:
            model, optimizer = _mixed(stage, precision, 1)
            load_checkpoint(directory, model, optimizer, tag=begun)
            row.append((weights(model), _moments(model, optimizer)))
            train(model, optimizer)
        found.append(row)
    return found


def test_masters_and_moments_stay_exact_between_mixed_precisions(tmp_path: Path) -> None:
    expected = run_ranks(_save_mixed, 2, str(tmp_path))[0]
    for rows in run_ranks(_load_mixed, 2, str(tmp_path)):
        for row in rows:
            for (loaded, moments), (saved, begun) in zip(row, expected, strict=True):
                _same(loaded, saved)
                _same(moments, begun)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _save_true(directory: str) -> dict[str, Any]:
    found = {}
    for dtype in DTYPES:
        model, optimizer = _job(3, PARTS, 0, dtype)
        train(model, optimizer)
        save_checkpoint(directory, model, optimizer, tag=str(dtype), step=1)
        found[str(dtype)] = weights(model), _moments(model, optimizer)
    return found


def _load_true(directory: str) -> dict[tuple[str, str], Any]:
    found = {}
    for dtype in DTYPES:
        for begun in DTYPES:
            model, optimizer = _job(3, PARTS, 1, dtype)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                load_checkpoint(directory, model, optimizer, tag=str(begun))
            told = [str(w.message) for w in caught if "the state is rounded" in str(w.message)]
            found[str(begun), str(dtype)] = weights(model), _moments(model, optimizer), told
            train(model, optimizer)  # torch's Adam refuses state of another dtype than the weights'
    return found


def test_16_bit_weights_and_their_moments_convert_and_train_on(tmp_path: Path) -> None:
    """Without fp32 masters: exactly to fp32, and rounded the other way, which is said."""
    saved = run_ranks(_save_true, 2, str(tmp_path))[0]
    for rank, found in enumerate(run_ranks(_load_true, 2, str(tmp_path))):
        for (begun, live), (loaded, moments, told) in found.items():
            dtype = getattr(torch, live.removeprefix("torch."))
            for got, expected in zip((loaded, moments), saved[begun], strict=True):
                for name, value in expected.items():
                    keeps = name.endswith("/step")
                    assert torch.equal(got[name], value if keeps else value.to(dtype)), name
            exact = begun == live or live == "torch.float32"
            assert bool(told) == (not exact and rank == 0), (begun, live)
