"""What others do with the same state: torch.distributed.checkpoint (DCP) and torch.save.

Each peer is measured at its best: the flat dict of live tensors is made before the clock starts,
DCP loads into the live tensors, and its writer's thread count is the fastest of those tried.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.measure import remove_and_settle, sync
from benchmarks.ranks import Rank

THREAD_COUNTS = (1, 2, 4)
Tensors = dict[str, torch.Tensor]


def dcp_save(state: Tensors, directory: Path, threads: int) -> None:
    """Collective. `sync_files`: every data file is fsynced, as ours are."""
    writer = dcp.FileSystemWriter(directory, thread_count=threads, sync_files=True)
    dcp.save({"state": state}, storage_writer=writer)


def dcp_load(state: Tensors, directory: Path) -> None:
    """Collective. Fills the given tensors in place."""
    dcp.load({"state": state}, storage_reader=dcp.FileSystemReader(directory))


def best_thread_count(rank: Rank, state: Tensors, directory: Path, trials: int = 1) -> int:
    """The writer's fastest thread count for this state. Collective; all ranks return the same."""
    seconds: dict[int, list[float]] = {threads: [] for threads in THREAD_COUNTS}
    for _ in range(trials):
        for threads in THREAD_COUNTS:
            seconds[threads].append(rank.timed(lambda: dcp_save(state, directory, threads)))  # noqa: B023
            rank.on_first(lambda: remove_and_settle(directory))
    return min(THREAD_COUNTS, key=lambda threads: min(seconds[threads]))


def dcp_collapse(directory: Path, output: Path) -> None:
    """One process, offline: a DCP checkpoint into one durable torch.save file."""
    dcp_to_torch_save(directory, output)
    sync(output)


def torch_save(locals_: Tensors, directory: Path, rank: int) -> None:
    """Every rank its own parts into its own file, with fsync."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"rank{rank}.pt"
    torch.save(locals_, file)
    sync(file)


def torch_load(locals_: Tensors, directory: Path, rank: int) -> None:
    """Reads this rank's file and copies it into the given tensors."""
    loaded = torch.load(directory / f"rank{rank}.pt", weights_only=True)
    for name, tensor in locals_.items():
        tensor.copy_(loaded[name])
