"""A small model with everything that the contract speaks of, sharded at any stage, and its state in plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt import zero
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.naming import innermost
from zero_ckpt.testing import FaultyStorage

__all__ = ["STAGES", "Net", "adamw", "opened", "recording", "shard", "train", "weights", "whole"]

STAGES = (0, 1, 2, 3)


class Net(nn.Module):
    """Odd sizes, a frozen layer as large as all else, a buffer."""

    steps: torch.Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(4, 7)
        self.base.requires_grad_(False)
        self.hidden = nn.Linear(7, 5)
        self.head = nn.Linear(5, 3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        result: torch.Tensor = self.head(torch.tanh(self.hidden(torch.tanh(self.base(x)))))
        return result


def adamw(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    """Two groups with options of their own."""
    inner = innermost(model)
    groups = [
        {"params": list(inner.get_submodule("hidden").parameters()), "weight_decay": 0.1},
        {"params": list(inner.get_submodule("head").parameters()), "lr": lr / 2, "weight_decay": 0},
    ]
    return torch.optim.AdamW(groups, lr=lr, foreach=False)


def shard(
    stage: int, seed: int = 0, lr: float = 0.1, make: Callable[[int], nn.Module] = Net
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer as a job of this stage has them, on all ranks."""
    net = make(seed)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return net, adamw(net, lr)
    if stage >= 2:
        mesh = zero.make_mesh(dist.get_world_size(), None, "cpu")
        zero.shard_module(net, stage=stage, mesh=mesh)
        return net, adamw(net, lr)
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = adamw(model, lr)
    return model, zero.partition_optimizer(optimizer) if stage == 1 else optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    dtype = next(p.dtype for p in model.parameters())
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(4, 4, generator=generator).to(dtype)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; collective for sharded ones."""
    inner = innermost(model)
    return {name: whole(t) for name, t in [*inner.named_parameters(), *inner.named_buffers()]}


def recording() -> FaultyStorage:
    """The local disk; `opened` tells of it which files were opened."""
    return FaultyStorage(LocalStorage(), names=["open", "get"])


def opened(storage: FaultyStorage) -> dict[str, int]:
    """How many files of each role (`manifest.json`, `model`, ...) below tags were opened."""
    paths = {Path(operation.path) for operation in storage.log}
    roles = [path.name.split("-")[0] for path in paths]
    return {role: roles.count(role) for role in sorted(set(roles) - {"latest"})}
