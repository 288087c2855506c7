"""Stages 1, 2 and 3 train exactly as stage 0 (DistributedDataParallel) does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.workers import run_ranks
from tests.zero.training import Net, assert_equal, make_net, train


def _equals_stage_0(stage: int, options: dict[str, Any], sharding: dict[str, Any]) -> None:
    assert_equal(train(stage, **options, **sharding), train(0, **options))


def check(
    stage: int, world_size: int = 2, sharding: dict[str, Any] | None = None, **options: Any
) -> None:
    run_ranks(_equals_stage_0, world_size, stage, options, sharding or {})


def test_stage_1_equals_stage_0() -> None:
    check(1)


def test_stage_2_equals_stage_0() -> None:
    check(2)


def test_stage_3_equals_stage_0() -> None:
    check(3)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_replicated_root_equals_stage_0(stage: int) -> None:
    check(stage, sharding={"root": "replicate"})


@pytest.mark.parametrize("stage", [1, 3])
def test_more_ranks_than_rows_equals_stage_0(stage: int) -> None:
    check(stage, world_size=4)


@pytest.mark.parametrize("root", ["shard", "replicate"])
def test_hybrid_sharding_equals_stage_0(root: str) -> None:
    check(3, world_size=4, sharding={"sharding_size": 2, "root": root})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulation_equals_stage_0(stage: int) -> None:
    check(stage, accumulate=3, steps=3)


def test_accumulation_with_a_replicated_root_equals_stage_0() -> None:
    check(3, accumulate=3, steps=3, sharding={"root": "replicate"})


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_clipping_by_norm_equals_stage_0(norm_type: float) -> None:
    check(3, clip_norm=0.05, norm_type=norm_type)


@pytest.mark.parametrize("stage", [1, 2])
def test_clipping_by_norm_equals_stage_0_at_stage(stage: int) -> None:
    check(stage, clip_norm=0.05)


def test_clipping_with_hybrid_sharding_and_a_replicated_root_equals_stage_0() -> None:
    check(3, world_size=4, clip_norm=0.05, sharding={"sharding_size": 2, "root": "replicate"})


def test_clipping_by_value_equals_stage_0() -> None:
    check(3, clip_value=1e-3)


def half_frozen() -> nn.Module:
    net = make_net()
    net.embed.requires_grad_(False)
    net.blocks[1].requires_grad_(False)
    return net


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_equal_stage_0(stage: int) -> None:
    check(stage, build=half_frozen)


def compiled_blocks() -> nn.Module:
    net = make_net()
    for block in net.blocks:
        block.compile(backend="eager")
    return net


@pytest.mark.slow
def test_compiled_blocks_equal_stage_0() -> None:
    check(3, build=compiled_blocks, steps=2)


class Inner(Net):
    """A compiled submodule under a root that is not compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(torch.compile(b, backend="eager") for b in self.blocks)


def wrapped_in_compile() -> nn.Module:
    torch.manual_seed(0)
    return Inner().double()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_wrappers_equal_stage_0(stage: int) -> None:
    check(stage, build=wrapped_in_compile, steps=2)


def compiled_model() -> nn.Module:
    net = make_net()
    net.compile(backend="eager")
    return net


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_compiled_model_equals_stage_0(stage: int) -> None:
    check(stage, build=compiled_model, steps=2)
