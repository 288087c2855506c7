"""Starts the ranks of a measured job and times what they do together.

Ranks are fresh processes with a default gloo group on this machine. The first failure of any rank
ends all of them and is raised in the caller. A rank's memory and caches die with its launch, so a
case that measures first saves launches anew for each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.options import Options


@dataclass(slots=True)
class Measured:
    """What a launch brings back: samples in seconds or bytes by name, and names to print."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def extend(self, other: Measured) -> None:
        for name, values in other.samples.items():
            self.samples.setdefault(name, []).extend(values)
        self.labels.update(other.labels)


@dataclass(frozen=True, slots=True)
class Rank:
    """This process's place in a launch."""

    rank: int
    world_size: int
    scratch: Path
    options: Options

    def barrier(self) -> None:
        dist.barrier()

    def largest(self, value: float) -> float:
        """The maximum of `value` over all ranks. Collective."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest.item())

    def timed(self, action: Callable[[], object]) -> float:
        """Runs `action` on every rank at once; returns the slowest rank's seconds. Collective."""
        self.barrier()
        start = time.perf_counter()
        action()
        return self.largest(time.perf_counter() - start)

    def on_first(self, action: Callable[[], object]) -> None:
        """Runs `action` on rank 0 while the others wait. Collective."""
        if self.rank == 0:
            action()
        self.barrier()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"  {text}", file=sys.stderr, flush=True)


# The work of one launch: a module-level function, called on every rank; rank 0's result is kept.
Work = Callable[..., Measured]


def launch(world_size: int, work: Work, scratch: Path, options: Options, *args: Any) -> Measured:
    """Runs `work(rank, *args)` in `world_size` new processes and returns rank 0's result.

    Raises torch.multiprocessing.ProcessRaisedException with the first failure's traceback.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answer = scratch / "measured.json"
    torch.multiprocessing.spawn(
        _enter,
        args=(world_size, store.port, work, scratch, options, answer, args),
        nprocs=world_size,
    )
    return Measured(**json.loads(answer.read_text()))


def _enter(
    rank: int,
    world_size: int,
    port: int,
    work: Work,
    scratch: Path,
    options: Options,
    answer: Path,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=10)
    )
    measured = work(Rank(rank, world_size, scratch, options), *args)
    dist.barrier()
    if rank == 0:
        answer.write_text(json.dumps(asdict(measured)))
    dist.destroy_process_group()
