"""Small training jobs of every kind that a checkpoint must hold, and their whole state in plain tensors.

All kinds train the same model on the same data, so that a checkpoint of one kind can be compared in any other. The
whole state is gathered here with torch's own means, and none of the package's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from zero_ckpt import Checkpointer

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Odd sizes, tied and frozen weights, a parameter that is never used, and every kind of buffer."""

    running: torch.Tensor
    count: torch.Tensor
    scratch: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.odd = nn.Linear(WIDTH, 3)
        self.tiny = nn.Parameter(torch.randn(1))
        self.unused = nn.Parameter(torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(2, 3), requires_grad=False)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("running", torch.zeros(WIDTH))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.notes: dict[str, Any] = {"seen": 0}

    def get_extra_state(self) -> dict[str, Any]:
        return dict(self.notes)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.notes = dict(state)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        self.running.mul_(0.9).add_(x.detach().mean((0, 1)))
        self.count += 1
        self.scratch += 1
        self.notes["seen"] += len(tokens)
        return (self.head(x) * self.tiny).square().mean() + self.odd(x).square().mean()


@dataclass
class Job:
    """A model in training. `raw` is the module without outer wrappers."""

    raw: Net
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            # The global generator: what a resumed run must continue. All ranks draw the same.
            loss = self.model(torch.randint(0, 11, (2, 5)))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.losses.append(loss.item())

    def checkpointer(self, **options: Any) -> Checkpointer:
        return Checkpointer(self.model, self.optimizer, self.scheduler, **options)


def _plain(net: Net) -> nn.Module:
    return net


def _ddp(net: Net) -> nn.Module:
    return DistributedDataParallel(net, find_unused_parameters=True)


def _fsdp(net: Net, mesh: Any = None) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _hybrid(net: Net) -> nn.Module:
    shape = (2, dist.get_world_size() // 2)
    return _fsdp(net, init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def _tensor_parallel(net: Net) -> nn.Module:
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    for block in net.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return _fsdp(net, mesh["dp"])


def _checkpointed(net: Net) -> nn.Module:
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    return _ddp(net)


def _compiled(net: Net) -> nn.Module:
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")  # type: ignore[call-overload]
    return _ddp(net)


KINDS: dict[str, Callable[[Net], nn.Module]] = {
    "plain": _plain,
    "ddp": _ddp,
    "zero1": _ddp,
    "fsdp": _fsdp,
    "hybrid": _hybrid,
    "tensor_parallel": _tensor_parallel,
    "checkpointed": _checkpointed,
    "compiled": _compiled,
}


def make_job(kind: str, seed: int = 0) -> Job:
    torch.manual_seed(seed)
    raw = Net()
    model = KINDS[kind](raw)
    parameters = dict(raw.named_parameters())
    decayed = [p for p in parameters.values() if p.ndim > 1 and p.requires_grad]
    others = [p for p in parameters.values() if p.ndim <= 1 and p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "lr": 0.02},
    ]
    optimizer: torch.optim.Optimizer
    if kind == "zero1":
        optimizer = ZeroRedundancyOptimizer(decayed, torch.optim.AdamW, lr=0.05, weight_decay=0.1)
        optimizer.add_param_group(groups[1])
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.05, foreach=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return Job(raw, model, optimizer, scheduler)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def clean(name: str) -> str:
    for part in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(part, "")
    return name


def whole_state(job: Job) -> dict[str, Any]:
    """Parameters, persistent buffers and optimizer state by name, on every rank; collective."""
    found: dict[str, Any] = {}
    for name, tensor in [
        *job.raw.named_parameters(remove_duplicate=False),
        *job.raw.named_buffers(),
    ]:
        if not name.endswith("scratch"):
            found[clean(name)] = whole(tensor)
    names = {id(p): clean(name) for name, p in job.raw.named_parameters()}
    inner = getattr(job.optimizer, "optim", job.optimizer)
    mine: dict[str, Any] = {}
    for parameter, state in inner.state.items():
        for name, value in state.items():
            mine[f"{names[id(parameter)]}/{name}"] = whole(value)
    if inner is not job.optimizer:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        mine = {key: value for part in parts for key, value in part.items()}
    return found | mine


def options_of(job: Job) -> list[dict[str, Any]]:
    """What the optimizer's groups say, but for their parameters."""
    return [{k: v for k, v in g.items() if k != "params"} for g in job.optimizer.param_groups]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name
