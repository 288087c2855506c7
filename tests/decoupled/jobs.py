"""What the ranks of these tests do: a small model, trained and saved beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from zero_ckpt import Checkpointer, SaveHandle
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.testing.faults import FaultyStorage, Operation

STAGES = ("ddp", "zero", "fsdp")
WIDTH = 64


class Net(nn.Module):
    """With batch norm, whose statistics the forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.norm(self.into(x)).relu())
        return found


class Run:
    """One rank's training."""

    def __init__(self, stage: str = "fsdp", **options: Any) -> None:
        torch.manual_seed(0)
        net = Net()
        self.model: nn.Module = net
        if stage == "fsdp":
            fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        else:
            self.model = DistributedDataParallel(net)
        self.optimizer: torch.optim.Optimizer
        if stage == "zero":
            self.optimizer = ZeroRedundancyOptimizer(
                self.model.parameters(), torch.optim.AdamW, lr=0.1
            )
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.checkpointer = Checkpointer(self.model, self.optimizer, timeout=20, **options)

    def forward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(16, 8)).pow(2).mean().backward()

    def step(self) -> None:
        self.forward()
        self.optimizer.step()

    def save(self, directory: str, tag: str, **options: Any) -> SaveHandle:
        return self.checkpointer.save_checkpoint(directory, tag=tag, **options)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's part of everything."""
        found = {name: _local(t).clone() for name, t in self.model.state_dict().items()}
        holder = getattr(self.optimizer, "optim", self.optimizer)
        for index, (_, values) in enumerate(sorted(holder.state.items(), key=lambda i: i[0].shape)):
            found |= {f"{index}/{name}": _local(v).clone() for name, v in values.items()}
        return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def storage(hook: Callable[[Operation], None], *names: str) -> FaultyStorage:
    return FaultyStorage(LocalStorage(), hook, names=names)


def saved_behind(directory: str) -> tuple[Gate, Run, dict[str, torch.Tensor]]:
    """A run that is saving `a`, of which nothing is staged before the gate is opened; and its state."""
    gate = Gate()
    run = Run(engine="async", storage=storage(gate, "create"))
    run.step()
    before = run.state()
    run.save(directory, "a")
    assert gate.reached.wait(20)
    return gate, run, before


class Gate:
    """Holds back storage operations until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, operation: Operation) -> None:
        self.reached.set()
        assert self._open.wait(30), "the gate was never opened"

    def open(self) -> None:
        self._open.set()
