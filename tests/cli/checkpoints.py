"""Real checkpoints for the command line's tests, saved by real ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.told import warned
from zero_ckpt import Checkpointer

WIDTH = 8


class Custom:
    """A value that only pickle can store, and whose opening leaves a trace in the file system."""

    def __init__(self, trace: str) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self._trace),)


class Net(nn.Module):
    """Repeated blocks, a tied weight, a frozen parameter, a buffer."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.norm.bias.requires_grad_(False)
        self.head = nn.Linear(width, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def save_sharded(directory: str, steps: list[int], width: int = WIDTH) -> None:
    """FSDP2 with Adam; a tag for each of `steps`."""
    torch.manual_seed(0)
    model = Net(width)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with Checkpointer(model, optimizer, scheduler) as checkpointer:
        for step in steps:
            model(torch.arange(4)).sum().backward()
            optimizer.step()
            state = {"epoch": 2, "losses": [0.5, float("nan")], "mask": torch.ones(3)}
            checkpointer.save_checkpoint(directory, client_state=state, step=step)


def save_replicated(directory: str, tag: str) -> None:
    """DDP: every rank has all, and each writes a part."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    with Checkpointer(model, optimizer) as checkpointer:
        checkpointer.save_checkpoint(directory, tag, step=1)


def save_pickled(directory: str, tag: str) -> None:
    """One process, and client state of Lightning's shape: what only pickle can store, and every other kind of value."""
    state = {
        "pytorch-lightning_version": "2.6.6",
        "custom": Custom(f"{directory}/ran"),
        "many": {f"key{i}": i for i in range(30)},
        "numbers": list(range(100)),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "parameter": nn.Parameter(torch.ones(2)),
        "array": torch.ones(2, 2).numpy(),
        ("a", 1): {"nested": (1, 2)},
        "\x1b[31mred": "\x1b]0;title\x07",
    }
    with Checkpointer(nn.Linear(2, 2)) as checkpointer:
        warned(checkpointer.save_checkpoint, directory, tag, client_state=state, step=3)
