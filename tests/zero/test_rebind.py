"""An optimizer made before sharding goes on with the sharded parameters and its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.workers import run_ranks
from tests.zero.training import adam, backward, batch, make_net, whole_weights
from zero_ckpt.zero import make_mesh, rebind_optimizer, shard_module


def _train(module: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        backward(module, step, 1)
        optimizer.step()
        optimizer.zero_grad()


def adafactor(module: nn.Module) -> Optimizer:
    return torch.optim.Adafactor([p for p in module.parameters() if p.numel()], lr=1e-1)


def _continues(build: Any, sharding_size: int | None, root: str) -> None:
    reference, net = make_net(), make_net()
    expected, optimizer = build(reference), build(net)
    _train(DistributedDataParallel(reference), expected, range(4))

    _train(DistributedDataParallel(net), optimizer, range(2))
    mesh = make_mesh(dist.get_world_size(), sharding_size, "cpu")
    sharding = shard_module(net, stage=3, mesh=mesh, root=root)
    before = sum(len(group["params"]) for group in optimizer.param_groups)
    moved = before - sum(1 for p in net.parameters() if p.numel() and not isinstance(p, DTensor))
    assert rebind_optimizer(optimizer, sharding.replaced) == (
        moved if build is adafactor else moved - 1
    )
    assert rebind_optimizer(optimizer, sharding.replaced) == 0
    _train(net, optimizer, range(2, 4))
    torch.testing.assert_close(whole_weights(net), whole_weights(reference), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("root", ["shard", "replicate"])
@pytest.mark.parametrize(("world_size", "sharding_size"), [(2, None), (4, 2)])
def test_training_continues_with_the_state(
    world_size: int, sharding_size: int | None, root: str
) -> None:
    run_ranks(_continues, world_size, adam, sharding_size, root)


def _state_is_placed() -> None:
    net = make_net()
    optimizer = adafactor(net)
    _train(DistributedDataParallel(net), optimizer, range(1))
    mesh = make_mesh(dist.get_world_size(), None, "cpu")
    rebind_optimizer(optimizer, shard_module(net, stage=3, mesh=mesh).replaced)
    state = optimizer.state[net.embed.weight]
    assert isinstance(state["row_var"], DTensor)
    assert state["row_var"].placements == (Replicate(),)
    assert not isinstance(state["step"], DTensor)
    assert set(optimizer.state) == {p for p in net.parameters() if p.numel()}


def test_state_of_another_shape_is_replicated_on_the_mesh() -> None:
    run_ranks(_state_is_placed, 2)


def _fresh_optimizer_and_scheduler() -> None:
    net = make_net()
    outside = nn.Parameter(torch.zeros(3).double())
    optimizer = torch.optim.SGD([*net.parameters(), outside], lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, 3)
    mesh = make_mesh(dist.get_world_size(), None, "cpu")
    sharding = shard_module(net, stage=2, mesh=mesh)
    rebind_optimizer(optimizer, sharding.replaced)
    assert optimizer.param_groups[0]["params"][-1] is outside
    assert not sharding.replaced  # the parameters before are freed, and their memory with them
    before = net(batch(0)).detach()
    _train(net, optimizer, range(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.75)
    assert not torch.equal(net(batch(0)).detach(), before)


def test_an_optimizer_without_state_is_rebound_and_old_parameters_are_freed() -> None:
    run_ranks(_fresh_optimizer_and_scheduler, 2)
