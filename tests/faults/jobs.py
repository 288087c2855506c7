"""A small training job that can be set to any step, and what the tests look at: its bits, its errors, what it leaves.

State at a step is a pure function of the step, so a checkpoint can be compared with a job that never saved.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.workers import Outcome, Ranks
from zero_ckpt import Checkpointer
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.core.storage import Storage

TIMEOUT = 15.0
"""Seconds of silence after which a rank counts as lost: more than a busy machine makes a rank wait."""

SHORT = 5.0
"""The same where a rank is silent on purpose. Nothing that should succeed may use it."""


class Net(nn.Module):
    count: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.second = nn.Linear(width, 3)
        self.register_buffer("count", torch.tensor(0))


@dataclass
class Job:
    """One rank's training job. `sharded`: parameters and state are DTensors; else every rank holds all."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    checkpointer: Checkpointer

    @classmethod
    def at(
        cls,
        step: int,
        *,
        sharded: bool = False,
        width: int = 16,
        storage: Storage | None = None,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> Job:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Net(width)
        if sharded:
            fully_shard(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        checkpointer = Checkpointer(
            model, optimizer, scheduler, storage=storage, timeout=timeout, **options
        )
        job = cls(model, optimizer, scheduler, checkpointer)
        for _ in range(step):
            job.advance()
        return job

    def advance(self) -> None:
        for number, parameter in enumerate(self.model.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + number)
        self.optimizer.step()
        self.scheduler.step()
        self.model.count += 1

    def save(self, directory: str | Path, **options: Any) -> str:
        """Save as `step<N>`, or the given tag; the tag's folder."""
        options = {"tag": f"step{self.checkpointer.global_step}", **options}
        client_state = {"step": self.checkpointer.global_step, "text": "kept"}
        return self.checkpointer.save_checkpoint(
            directory, client_state=client_state, **options
        ).path

    def load(self, directory: str | Path, **options: Any) -> str:
        """Load; the tag that was loaded."""
        path, client_state = self.checkpointer.load_checkpoint(directory, **options)
        assert client_state["text"] == "kept"
        return os.path.basename(path)

    def bits(self) -> str:
        """A digest of everything that a load may change on this rank, random generators included."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        digest = hashlib.sha256()
        _add(digest, state)
        return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in value:
            digest.update(repr(key).encode())
            _add(digest, value[key])
    elif isinstance(value, torch.Tensor):
        local = value.to_local() if isinstance(value, DTensor) else value
        digest.update(f"{local.dtype}{tuple(local.shape)}".encode())
        digest.update(local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())


@dataclass(frozen=True)
class Raised:
    """The error that a call ended with on one rank."""

    kind: str
    text: str


def raised(call: Callable[..., Any], *args: Any, **options: Any) -> Raised:
    """What `call` raises. Fails when it returns."""
    try:
        value = call(*args, **options)
    except Exception as error:
        return Raised(type(error).__name__, str(error))
    raise AssertionError(f"nothing was raised; the value was {value!r}")


def contents(
    directory: str | Path, tag: str | None = None, storage: Storage | None = None
) -> dict[str, str]:
    """Digests of everything in a checkpoint, every byte verified: by tensor and tree."""
    found = {}
    with open_checkpoint(directory, tag, storage=storage) as checkpoint:
        for role in ("model", "optim", "state"):
            for key in checkpoint.keys(role):
                found[f"{role}/{key}"] = _digest(checkpoint.tensor(role, key))
        found["objects"] = _digest(checkpoint.objects())
        for rank in range(checkpoint.manifest.world_size):
            found[f"rank {rank}"] = _digest(checkpoint.rank_objects(rank))
    return found


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def files(directory: str | Path) -> list[str]:
    """Paths of all files below, relative, sorted."""
    root = Path(directory)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def unlisted(directory: str | Path, tag: str) -> list[str]:
    """Files of a committed tag's folder that its manifest does not list."""
    with open_checkpoint(directory, tag) as checkpoint:
        listed = {"manifest.json", *checkpoint.manifest.files}
    return [name for name in files(Path(directory) / tag) if name not in listed]


def resources() -> tuple[list[str], list[str], int]:
    """This process's open files, the package's threads, and the number of open sockets."""
    gc.collect()
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
    opened = sorted(path for path in targets if path.startswith("/") and "/dev/" not in path)
    threads = [t.name for t in threading.enumerate() if t.name.startswith("zero_ckpt")]
    return opened, threads, sum(path.startswith("socket:") for path in targets)


def step_saved(directory: str, step: int, sharded: bool = False, overwrite: str = "") -> str:
    """A rank function: save the state of `step`, as the tag `overwrite` or its own."""
    options = {"tag": overwrite} if overwrite else {}
    return Job.at(step, sharded=sharded).save(directory, **options)


def save_again(directories: list[str], tag: str) -> list[str]:
    """Resume from what each crash left, and save over it."""
    loaded = []
    for directory in directories:
        job = Job.at(0)
        loaded.append(job.load(directory))
        job.advance()
        job.save(directory, tag=tag)
    return loaded


def printed_dice() -> random.Random:
    """Chance that can be had again: set ZERO_CKPT_SEED to the number that a failed test printed."""
    seed = int(os.environ.get("ZERO_CKPT_SEED", random.randrange(1 << 32)))
    print(f"ZERO_CKPT_SEED={seed}")
    return random.Random(seed)


def await_file(path: str | Path) -> None:
    """Wait for another process to have made it."""
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"{path} was never made"
        time.sleep(0.02)


def run_many(starts: list[Callable[[], Ranks]], at_once: int = 8) -> list[list[Outcome]]:
    """Run several jobs, some at a time: they mostly wait for each other's timeouts. Their outcomes, in order."""
    done: list[list[Outcome]] = []
    for begin in range(0, len(starts), at_once):
        running: list[Ranks] = []
        try:
            running += [start() for start in starts[begin : begin + at_once]]
            done += [ranks.wait(timeout=60) for ranks in running]
        finally:
            for ranks in running:
                ranks.kill()
    return done
