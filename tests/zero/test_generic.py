"""Classes that derive from `typing.Generic` before they derive from a module."""

from __future__ import annotations

from typing import Generic, TypeVar

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tests.workers import run_ranks
from tests.zero.training import Block, Net, Run, assert_equal, train

T = TypeVar("T")


class GenericBlock(Generic[T], Block):
    pass


class GenericNet(Generic[T], Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GenericBlock[int]() for _ in range(3))


class NarrowedNet(GenericNet[int]):
    pass


def make_narrowed() -> nn.Module:
    torch.manual_seed(0)
    return NarrowedNet().double()


def _run(stage: int) -> Run:
    made: list[nn.Module] = []

    def build() -> nn.Module:
        made.append(make_narrowed())
        return made[0]

    run = train(stage, build=build)
    if stage:
        assert isinstance(made[0], FSDPModule)
        assert isinstance(made[0], NarrowedNet)
        assert all(isinstance(block, FSDPModule) for block in made[0].blocks)
    return run


@pytest.mark.parametrize("stage", [2, 3])
def test_generic_modules_train_as_at_stage_0(stage: int) -> None:
    for run, reference in zip(run_ranks(_run, 2, stage), run_ranks(_run, 2, 0), strict=True):
        assert_equal(run, reference)
