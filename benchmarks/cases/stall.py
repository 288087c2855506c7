"""How long training stands still for a save that is written beside it, against DCP's `async_save` and a memcpy.

A round saves, computes as a forward and backward would (`COMPUTE` seconds of matrix products when
nothing else runs), and comes to the next optimizer step. It stands still in the call itself and at the
step, until the state may change. The save is waited for outside the clock.

Writing alone slows down what computes beside it, by the system's own work and the traffic on the memory: that is
measured with raw writes of as many bytes from a buffer that is never filled again. Two ranks keep every core of a
small machine busy; one rank leaves cores to the save, as trainings do whose host has more cores than ranks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.bench import Bench
from benchmarks.job import Job
from benchmarks.limits import TARGET_BYTES, RawFiles, Way, copy_into
from benchmarks.measure import remove_and_settle, rotated, rounds
from benchmarks.options import Options
from benchmarks.ours import OursAsync
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_least, at_most, faster, slowdown
from benchmarks.workload import build_large

RANKS = 2
COMPUTE, COMPUTE_SMOKE = 2.0, 0.05
TO_MEMCPY, TO_DCP, BEYOND_DISK = 0.25, 10.0, 1.05
RAW_WAY = Way(block=4 << 20, streams=1)


def stall(bench: Bench) -> list[Row]:
    measured = bench.launch(RANKS, _measure, True)
    alone = bench.launch(1, _measure, False)
    what = f"async save, stall, {measured.labels['size']} per rank"
    step = f"{_seconds(bench.options):g} s of computing while a save drains"
    spare = f"{step}, 1 rank on 1 core, {alone.labels['size']}"
    return [
        slowdown("stall", what, measured, "ours", "memcpy", at_most(TO_MEMCPY)),
        faster("stall", what, measured, "ours", "dcp thread", at_least(TO_DCP)),
        faster("stall", what, measured, "ours", "dcp process", at_least(TO_DCP)),
        slowdown("stall", step, measured, "ours step", "raw step", at_most(BEYOND_DISK)),
        slowdown("stall", spare, alone, "ours step", "raw step", at_most(BEYOND_DISK)),
        slowdown("stall", spare, alone, "ours step", "step"),
        slowdown("stall", step, measured, "raw step", "step"),
        slowdown("stall", step, measured, "ours step", "step"),
        slowdown("stall", step, measured, "ours step", "dcp thread step"),
        slowdown("stall", step, measured, "ours step", "dcp process step"),
    ]


def _seconds(options: Options) -> float:
    return COMPUTE_SMOKE if options.smoke else COMPUTE


@dataclass(frozen=True, slots=True)
class _Way:
    """`save` returns what to call before the state may change, and what to call to wait for the end."""

    name: str
    save: Callable[[Path], tuple[Callable[[], object], Callable[[], object]]]


def _measure(rank: Rank, peers: bool) -> Measured:
    if not peers:
        torch.set_num_threads(1)  # and all other cores are free
    job = Job(rank, build_large)
    work = _Work(_seconds(rank.options))
    ours = OursAsync(job.model, job.optimizer)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank.rank)}  # for DCP's processes
    ways = [_Way("ours", ours.save), _Way("raw", _raw(RawFiles(rank, job.local_bytes)))]
    for kind in (AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS) if peers else ():
        ways.append(_Way(f"dcp {kind.value}", _dcp(job, kind)))
    target = torch.zeros(TARGET_BYTES, dtype=torch.uint8)

    def play(turn: int) -> dict[str, float]:
        copied = rank.timed(lambda: copy_into(target, job.parts.values()))
        found = {"step": rank.timed(work.run), "memcpy": copied}
        for way in rotated(ways, turn):
            found |= _round(rank, way, work)
        return found

    measured = rounds(rank, play)
    ours.close()
    measured.labels = {
        "size": f"{job.local_bytes / 1e9:.2f} GB",
        "memcpy": "memcpy of the rank's state",
        "dcp thread": "DCP async_save, thread",
        "dcp process": "DCP async_save, process",
        "raw": "raw direct I/O with fsync",
        "raw step": "raw writes of as many bytes",
        "step": "no save under way",
        "dcp thread step": "DCP's drains, thread",
        "dcp process step": "DCP's drains, process",
    }
    return measured


def _round(rank: Rank, way: _Way, work: _Work) -> dict[str, float]:
    """Seconds that training stood still, and that its computing took."""
    directory = rank.scratch / way.name
    rank.barrier()
    start = time.perf_counter()
    staged, wait = way.save(directory)
    saved = time.perf_counter()
    work.run()
    computed = time.perf_counter()
    staged()
    stood = saved - start + time.perf_counter() - computed
    wait()
    rank.barrier()
    rank.on_first(lambda: remove_and_settle(directory))
    return {way.name: rank.largest(stood), f"{way.name} step": rank.largest(computed - saved)}


def _dcp(job: Job, kind: AsyncCheckpointerType) -> Callable[..., object]:
    def save(directory: Path) -> tuple[Callable[[], object], Callable[[], object]]:
        writer = dcp.FileSystemWriter(directory, sync_files=True)
        future = dcp.async_save(
            {"state": job.state}, storage_writer=writer, async_checkpointer_type=kind
        )
        return (lambda: None), future.result  # it has staged when it returns

    return save


def _raw(files: RawFiles) -> Callable[..., object]:
    def save(directory: Path) -> tuple[Callable[[], object], Callable[[], object]]:
        thread = threading.Thread(target=files.write, args=(directory, RAW_WAY))
        thread.start()
        return (lambda: None), thread.join

    return save


class _Work:
    """As many matrix products as take `seconds` here when nothing else runs."""

    def __init__(self, seconds: float) -> None:
        self._matrix = torch.randn(512, 512)
        self._count = 1
        while (taken := self._timed()) < seconds / 4:
            self._count *= 2
        self._count = max(1, round(self._count * seconds / taken))

    def run(self) -> None:
        for _ in range(self._count):
            self._matrix @ self._matrix

    def _timed(self) -> float:
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start
