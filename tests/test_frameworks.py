"""The plain `Checkpointer` in loops of Fabric, Accelerate and Lightning: their wrappers leave no trace on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tests.workers import run_ranks
from zero_ckpt import Checkpointer, get_fp32_state_dict_from_zero_checkpoint, zero

Job = tuple[Any, Any, Callable[[torch.Tensor], Any]]


class Net(nn.Module):
    """Has a child called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.tanh(self.module(x)))
        return result


NAMES = ["head.bias", "head.weight", "module.bias", "module.weight"]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def plain() -> Job:
    net = Net()
    return net, adam(net), torch.Tensor.backward


def fabric(stage: int = 0, compiled: bool = False) -> Job:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    fabric.launch()
    net = Net()
    optimizer = adam(net)
    if stage:
        optimizer = zero.partition_optimizer(optimizer)
    net, optimizer = fabric.setup(net, optimizer)
    return torch.compile(net, backend="eager") if compiled else net, optimizer, fabric.backward


def fabric_sharded() -> Job:
    def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        zero.shard_module(model, stage=3, mesh=mesh["data_parallel"])
        return model

    strategy = ModelParallelStrategy(shard, dist.get_world_size(), 1)
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    net = fabric.setup_module(Net())
    return net, fabric.setup_optimizers(adam(net)), fabric.backward


def accelerated() -> Job:
    accelerator = Accelerator(cpu=True)
    net = Net()
    return *accelerator.prepare(net, adam(net)), accelerator.backward


def in_lightning() -> Job:
    net = Net()
    return net, LightningOptimizer(adam(net)), torch.Tensor.backward


JOBS: dict[str, Callable[[], Job]] = {
    "fabric": fabric,
    "fabric, compiled": lambda: fabric(compiled=True),
    "fabric, stage 1": lambda: fabric(stage=1),
    "fabric, stage 3": fabric_sharded,
    "accelerate": accelerated,
}


def step(job: Job) -> float:
    model, optimizer, backward = job
    loss = model(torch.ones(2, 4)).square().mean()
    backward(loss)
    (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).step()
    optimizer.zero_grad()
    return float(loss.detach())


def _train(kind: str, directory: str) -> tuple[list[float], list[float]]:
    job = JOBS[kind]()
    step(job)
    Checkpointer(*job[:2], rng=False).save_checkpoint(directory, step=1)
    expected = [step(job) for _ in range(2)]
    again = JOBS[kind]()
    step(again)
    Checkpointer(*again[:2], rng=False).load_checkpoint(directory)
    return expected, [step(again) for _ in range(2)]


def _resume(kind: str, directory: str) -> list[float]:
    job = JOBS[kind]()
    Checkpointer(*job[:2], rng=False).load_checkpoint(directory)
    return [step(job) for _ in range(2)]


@pytest.mark.parametrize("kind", JOBS)
def test_what_a_wrapped_loop_saves_opens_without_the_framework(kind: str, tmp_path: Path) -> None:
    (expected, resumed), _ = run_ranks(_train, 2, kind, str(tmp_path))
    assert resumed == expected
    assert sorted(get_fp32_state_dict_from_zero_checkpoint(tmp_path)) == NAMES
    job = plain()
    Checkpointer(*job[:2], rng=False).load_checkpoint(tmp_path)
    assert [step(job) for _ in range(2)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", JOBS)
def test_a_wrapped_loop_opens_what_a_plain_one_saved(kind: str, tmp_path: Path) -> None:
    job = plain()
    step(job)
    Checkpointer(*job[:2], rng=False).save_checkpoint(tmp_path, step=1)
    expected = [step(job) for _ in range(2)]
    assert run_ranks(_resume, 2, kind, str(tmp_path))[0] == pytest.approx(expected)


def test_an_optimizer_that_lightning_has_wrapped_is_called_as_it_is(tmp_path: Path) -> None:
    job = in_lightning()
    step(job)
    Checkpointer(*job[:2], rng=False).save_checkpoint(tmp_path, step=1)
    expected, other = step(job), plain()
    Checkpointer(*other[:2], rng=False).load_checkpoint(tmp_path)
    assert step(other) == expected
