"""Sharded training goes on after a pass that raised as if that pass had not been made."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from tests.workers import run_ranks
from tests.zero.training import Fails, Run, adam, assert_equal, backward, make_net, whole_weights
from zero_ckpt.zero import make_mesh, reshard, shard_module
from zero_ckpt.zero.dropped import drop_with_zero_grad
from zero_ckpt.zero.sync import gradient_sync_disabled


def _failing_net(stage: int, root: str) -> nn.Module:
    net: Any = make_net()
    net.blocks[1].register_forward_pre_hook(lambda _, args: (Fails.apply(args[0]),))
    mesh = make_mesh(dist.get_world_size(), None, "cpu")
    shard_module(net, stage=stage, mesh=mesh, root=root)  # type: ignore[arg-type]
    whole: nn.Module = net
    return whole


def _run(stage: int, root: str, fails: bool, accumulates: bool) -> Run:
    net = _failing_net(stage, root)
    optimizer = adam(net)
    drop_with_zero_grad(optimizer, net)
    run = Run()
    for step in range(4):
        if fails and step in (1, 2):
            if accumulates:
                with gradient_sync_disabled(net):
                    backward(net, 50 + step, 1)
            Fails.armed = True
            with pytest.raises(ArithmeticError, match="in the middle"):
                backward(net, 90 + step, 1)
            Fails.armed = False
            optimizer.zero_grad()
        run.losses.append(backward(net, step, 1))
        optimizer.step()
        optimizer.zero_grad()
    reshard(net)
    run.weights = whole_weights(net)
    return run


def _goes_on(stage: int, root: str) -> None:
    expected = _run(stage, root, False, False)
    for accumulates in (False, True):
        assert_equal(_run(stage, root, True, accumulates), expected)


@pytest.mark.parametrize("root", ["shard", "replicate"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_backward_pass_that_failed_leaves_nothing(stage: int, root: str) -> None:
    run_ranks(_goes_on, 2, stage, root)
