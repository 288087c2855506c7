"""Sharding over the data-parallel dimension of a mesh that also has a tensor-parallel one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy

from tests.workers import run_ranks
from tests.zero.training import WIDTH, Net, adam, whole_weights
from zero_ckpt.zero import clip_grad_norm_, shard_module


class EvenNet(Net):
    """Tensor parallelism in torch divides layers evenly."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))


def make_even(seed: int = 0) -> EvenNet:
    torch.manual_seed(seed)
    return EvenNet().double()


def tokens_of(step: int, replica: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + replica)
    return torch.randint(0, 13, (2, 5), generator=generator)


def loss_of(net: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = net(tokens[:, :-1])
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _alone(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What two replicas would compute, in one process."""
    net = make_even()
    optimizer = adam(net)
    norms = []
    for step in range(steps):
        for replica in range(2):
            (loss_of(net, tokens_of(step, replica)) / 2).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, whole_weights(net)


def _parallel(net: EvenNet, mesh: DeviceMesh) -> None:
    for block in net.blocks:
        parallelize_module(block.mlp, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _equals_one_process(stage: int, root: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = make_even(seed=dist.get_rank() // 2)  # tensor-parallel ranks must start equal
    _parallel(net, mesh["tensor"])
    shard_module(net, stage=stage, mesh=mesh["data"], root=root)
    weight = net.blocks[0].mlp[0].weight
    assert isinstance(weight, DTensor)
    assert weight.device_mesh.ndim == 2
    optimizer = adam(net)
    norms = []
    for step in range(3):
        loss_of(net, tokens_of(step, mesh.get_local_rank("data"))).backward()
        norms.append(clip_grad_norm_(net.parameters(), 0.05).item())
        optimizer.step()
        optimizer.zero_grad()
    expected_norms, expected = _alone(steps=3)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    torch.testing.assert_close(whole_weights(net), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("stage", "root"), [(2, "shard"), (3, "shard"), (3, "replicate")])
def test_tensor_parallel_units_train_as_in_one_process(stage: int, root: str) -> None:
    run_ranks(_equals_one_process, 4, stage, root)


class Resettable(EvenNet):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.shift, 0.1)
        nn.init.constant_(self.scale, 1.5)
        self.steps.fill_(7)


def _meta_weights(parallel: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(dist.get_rank() // 2)  # tensor-parallel ranks must start equal
    with torch.device("meta"):
        net = Resettable()
    shape = (2, 2) if parallel else (1, 1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    if parallel:
        _parallel(net, mesh["tensor"])
    shard_module(net, stage=3, mesh=mesh["data"])
    return whole_weights(net)


def test_tensor_parallel_meta_modules_get_the_values_of_whole_ones() -> None:
    expected = run_ranks(_meta_weights, 1, False)[0]
    for weights in run_ranks(_meta_weights, 4, True):
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
