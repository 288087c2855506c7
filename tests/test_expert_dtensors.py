"""Stacked experts as DTensors on a mesh dimension of their own, with and without FSDP2 on another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.workers import run_ranks
from tests.zero.training import whole
from zero_ckpt import Checkpointer, get_fp32_state_dict_from_zero_checkpoint

EXPERTS, WIDTH, HIDDEN = 6, 4, 6


class Stacked(nn.Module):
    """All experts of a layer in two tensors, [experts, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = Stacked()


LAYOUTS = {
    "whole": (1, 0, None),
    "two": (2, 1, None),
    "four": (4, 1, None),
    "two by two": (4, 2, 1),
    "two by two, along experts": (4, 2, 0),
}
"""world size, dimensions of the mesh: none, experts alone, FSDP2 beside them; the tensor dimension that FSDP2 cuts"""


def make(layout: str, seed: int) -> Net:
    world, dimensions, cut = LAYOUTS[layout]
    net = Net(seed)
    if not dimensions:
        return net
    shape = (world,) if dimensions == 1 else (2, world // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "expert")[-dimensions:])
    for name, tensor in dict(net.experts.named_parameters()).items():
        spread = distribute_tensor(tensor.detach(), mesh["expert"], [Shard(0)])
        net.experts.register_parameter(name, nn.Parameter(spread))
    if dimensions == 2:
        fully_shard(net.experts, mesh=mesh["data"], shard_placement_fn=lambda p: Shard(cut))
        fully_shard(net.gate, mesh=mesh["data"])
    return net


def step(net: Net) -> torch.optim.Optimizer:
    """Adam with gradients that are known without a forward pass."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for number in (1.0, 2.0):
        for parameter in net.parameters():
            parameter.grad = (parameter.detach() * number).clone()
        optimizer.step()
    return optimizer


def everything(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: whole(p) for name, p in net.named_parameters()}
    for name, parameter in net.named_parameters():
        state = optimizer.state[parameter]
        found |= {f"{name}/{key}": whole(value) for key, value in state.items()}
    return found


def _save(layout: str, directory: str) -> dict[str, torch.Tensor]:
    net = make(layout, seed=0)
    optimizer = step(net)
    Checkpointer(net, optimizer, rng=False).save_checkpoint(directory, "stacked")
    return everything(net, optimizer)


def _load(layout: str, directory: str) -> dict[str, torch.Tensor]:
    net = make(layout, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    Checkpointer(net, optimizer, rng=False).load_checkpoint(directory)
    assert optimizer.param_groups[0]["lr"] == 0.1
    return everything(net, optimizer)


@pytest.mark.parametrize("saved", ["whole", "two by two", "two by two, along experts"])
def test_stacked_experts_load_at_any_size_and_collapse(saved: str, tmp_path: Path) -> None:
    expected = run_ranks(_save, LAYOUTS[saved][0], saved, str(tmp_path))[0]
    for layout in LAYOUTS.keys() - {saved}:
        for found in run_ranks(_load, LAYOUTS[layout][0], layout, str(tmp_path)):
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (layout, name)
    net = Net(seed=2)
    net.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(tmp_path), strict=True)
    assert all(torch.equal(p, expected[name]) for name, p in net.named_parameters())
