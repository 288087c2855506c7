"""Interleaved rounds, the page cache, free memory and peak memory: how a measurement is taken.

A round runs every contestant once, and each round starts with another one, so that a slow spell of
a shared disk, and the freeing of the blocks of deleted files, fall on all of them alike.
"""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.ranks import Measured, Rank
from zero_ckpt.core.memory import available_bytes

SETTLE_SECONDS = 0.3  # a mount with `discard` frees deleted blocks in the background
COPY_BYTES = 8 << 20
FREE_PER_PARAMETER = 24  # bytes: its weight and Adam state, in new tensors and in the page cache
Item = TypeVar("Item")


def nothing(_turn: int) -> None:
    """No preparation, or no cleaning up."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do the work. Each function gets the number of the round, on every rank."""

    name: str
    run: Callable[[int], object]  # timed
    prepare: Callable[[int], None] = nothing
    clean: Callable[[int], None] = nothing


def interleave(
    rank: Rank, contestants: Sequence[Contestant], *, warm_up: int = 1, needs_memory: bool = True
) -> Measured:
    """Seconds of each contestant by round (of the slowest rank), the first `warm_up` left out.

    Not `needs_memory`: what only computes, and would be disturbed by the system that takes memory back meanwhile.
    """
    measured = Measured()
    memory = FreeMemory(rank.options.params * FREE_PER_PARAMETER if needs_memory else 1)
    for turn in range(warm_up + rank.options.repeats):
        for contestant in rotated(contestants, turn):
            rank.on_first(memory.take)
            contestant.prepare(turn)
            rank.on_first(memory.give_back)
            seconds = rank.timed(lambda: contestant.run(turn))  # noqa: B023 - called at once
            contestant.clean(turn)
            rank.say(f"round {turn}: {contestant.name} {seconds:.3f} s")
            if turn >= warm_up:
                measured.add(contestant.name, seconds)
    return measured


def rounds(rank: Rank, play: Callable[[int], dict[str, float]]) -> Measured:
    """What `play(number of the round)` measured, by name, the first round left out."""
    measured = Measured()
    for turn in range(1 + rank.options.repeats):
        found = play(turn)
        for name, value in found.items() if turn else ():
            measured.add(name, value)
        rank.say(f"round {turn}: " + ", ".join(f"{k} {v:.4f} s" for k, v in found.items()))
    return measured


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """The items in order, starting with another one each turn."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def remove_and_settle(*paths: Path) -> None:
    """Removes files and folders, and waits until their blocks are free."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    os.sync()
    time.sleep(SETTLE_SECONDS)


def files_under(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def bytes_under(path: Path) -> int:
    return sum(file.stat().st_size for file in files_under(path))


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FreeMemory:
    """Holds memory until a contestant is about to run, which then finds it free and cheap to touch.

    A virtual machine hands free memory to its host within seconds, and to get it again can cost more than to read as
    much from the disk. Without this, chance decides which contestant pays for it.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = min(nbytes, available_bytes() // 2)
        self._memory: mmap.mmap | None = None

    def take(self) -> None:
        self._memory = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, self._nbytes, mmap.PAGESIZE):
            self._memory[at] = 1

    def give_back(self) -> None:
        if self._memory is not None:
            self._memory.close()


def make_cold(path: Path) -> None:
    """Removes the pages of all files under `path` from the page cache (writing them back first)."""
    for file in files_under(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def make_warm(path: Path) -> None:
    """Reads all files under `path` once, so that they lie in the page cache."""
    buffer = memoryview(bytearray(COPY_BYTES))
    for file in files_under(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


@dataclass(slots=True)
class PeakMemory:
    """`extra`: bytes by which the resident set of this process rose above where it began."""

    extra: int = 0


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measures the peak of this process's resident set, mapped file pages included.

    Writing `5` to `/proc/self/clear_refs` resets the high-water mark, VmHWM: proc(5).
    """
    peak = PeakMemory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    yield peak
    peak.extra = max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
