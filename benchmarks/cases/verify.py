"""`zero-ckpt verify` of a checkpoint in one process, from a cold cache, against a raw read of the same files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.job import Job
from benchmarks.limits import BLOCK, MIB
from benchmarks.measure import bytes_under, files_under, make_cold, remove_and_settle, rotated
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_least, faster
from benchmarks.workload import build_large
from zero_ckpt.core.memory import aligned_buffer

RANKS = 2
STREAMS = 4
PART = 4 * MIB
GOAL = 0.8  # start-up of the command included


def verify(bench: Bench) -> list[Row]:
    bench.launch(RANKS, _save)
    directory = bench.scratch / "ours"
    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: _verify(directory),
        "raw": lambda: _read(directory),
    }
    measured = Measured(labels={"raw": f"raw read, {PART // MIB} MiB x {STREAMS}"})
    for turn in range(bench.options.repeats):
        for name, act in rotated(list(ways.items()), turn):
            make_cold(directory)
            start = time.perf_counter()
            act()
            measured.add(name, time.perf_counter() - start)
            print(f"  round {turn}: {name} {measured.samples[name][-1]:.3f} s", file=sys.stderr)
    what = f"verify cold, {bytes_under(directory) / 1e9:.2f} GB"
    remove_and_settle(directory)
    return [faster("verify", what, measured, "ours", "raw", at_least(GOAL))]


def _save(rank: Rank) -> Measured:
    Job(rank, build_large).ours.save(rank.scratch / "ours")
    return Measured()


def _verify(directory: Path) -> None:
    command = [sys.executable, "-m", "zero_ckpt", "verify", str(directory)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _read(directory: Path) -> None:
    """All files with direct I/O, in one process."""
    with ThreadPoolExecutor(STREAMS) as pool:
        for file in files_under(directory):
            list(pool.map(_read_part, *_parts(file)))


def _parts(file: Path) -> tuple[list[Path], list[int]]:
    offsets = list(range(0, -(-file.stat().st_size // BLOCK) * BLOCK, PART))
    return [file] * len(offsets), offsets


def _read_part(file: Path, offset: int) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(descriptor, [_buffer()], offset)
    finally:
        os.close(descriptor)


_own = threading.local()


def _buffer() -> memoryview:
    """This thread's: direct I/O needs aligned memory, and new memory is slow."""
    if not hasattr(_own, "buffer"):
        _own.buffer = aligned_buffer(PART)
    return _own.buffer
