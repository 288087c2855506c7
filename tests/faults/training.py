"""A training run that may be killed and started again: plain PyTorch with FSDP2 on every rank, and a `Checkpointer`.

Batches and dropout come from torch's own generator, so every loss depends on all that a checkpoint holds: weights,
optimizer, schedule, random state. Each rank logs its losses, and what it knows to be committed.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.faults.jobs import TIMEOUT
from zero_ckpt import Checkpointer
from zero_ckpt.core.handle import SaveHandle

STEPS = 30
SAVE_EVERY = 2


def train(directory: str, logs: str, engine: str, keep_last: int | None) -> None:
    """Train from the newest checkpoint, if there is one, to the end."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 3))
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    checkpointer = Checkpointer(
        model, optimizer, schedule, keep_last=keep_last, timeout=TIMEOUT, engine=engine
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no checkpoint yet
        checkpointer.load_checkpoint(directory, missing_ok=True)
    saving: SaveHandle | None = None
    with Path(logs, str(dist.get_rank())).open("a", buffering=1) as log:
        if checkpointer.global_step:  # a kill may have come before anybody was told
            log.write(f"committed global_step{checkpointer.global_step}\n")
        while checkpointer.global_step < STEPS:
            loss = model(torch.randn(4, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            log.write(f"loss {checkpointer.global_step} {loss.item().hex()}\n")
            if checkpointer.global_step % SAVE_EVERY == 0:
                _await(saving, log)
                saving = checkpointer.save_checkpoint(directory)
        _await(saving, log)
        checkpointer.close()


def _await(saving: SaveHandle | None, log: TextIO) -> None:
    if saving is not None:
        saving.wait()
        log.write(f"committed {saving.tag}\n")


def read_losses(logs: Path) -> dict[tuple[str, str], set[str]]:
    """By rank and step, every loss that was ever logged for it."""
    losses: dict[tuple[str, str], set[str]] = {}
    for path in logs.iterdir():
        for line in path.read_text().splitlines():
            kind, step, *rest = line.split()
            if kind == "loss":
                losses.setdefault((path.name, step), set()).update(rest)
    return losses


def read_committed(logs: Path) -> int:
    """The step of the newest checkpoint that some rank knew to be committed; 0 for none."""
    lines = [line for path in logs.iterdir() for line in path.read_text().splitlines()]
    tags = [line.split()[1] for line in lines if line.startswith("committed ")]
    return max((int(tag.removeprefix("global_step")) for tag in tags), default=0)
