"""What the machine can do at best: raw parallel writes and reads, and `cp`.

Every rank moves its own bytes, all ranks at once. Writes go to new files, as a save's do, with
direct I/O and fsync, from buffers that are filled before the clock starts; reads go into buffers
that have been touched before. The block size and the number of streams per rank are chosen by
trying all of them: the limit is the best that this disk shows.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.measure import bytes_under, make_cold, remove_and_settle, sync
from benchmarks.ranks import Rank
from zero_ckpt.core.memory import aligned_buffer

BLOCK = 4096  # direct I/O: file offsets, lengths and addresses are multiples of it
TRIAL_BYTES = 512 << 20  # per rank and trial, while the best way is looked for
TRIALS = 2
TARGET_BYTES = 256 << 20
"""Of the buffer that `copy_into` gets: more than a processor's caches hold."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Way:
    """One way of moving bytes: block size in bytes, streams per rank, direct or buffered."""

    block: int
    streams: int
    direct: bool = True

    def __str__(self) -> str:
        kind = "" if self.direct else ", buffered"
        return f"{self.block // MIB} MiB x {self.streams}{kind}"


WRITE_WAYS = [Way(block * MIB, streams) for block in (1, 4, 16) for streams in (1, 2)]
READ_WAYS = [Way(block * MIB, streams) for block in (1, 4, 16) for streams in (1, 2, 4)]


class RawFiles:
    """One rank's raw I/O: as many files as streams when writing, one file when reading.

    Two streams that extend one file would wait for its lock in turn (ext4), so each has its own.
    """

    def __init__(self, rank: Rank, size: int) -> None:
        """`size`: bytes that this rank moves, rounded up to whole blocks."""
        self.rank = rank
        self.size = -(-size // BLOCK) * BLOCK
        self._buffers = [_filled_buffer(16 * MIB) for _ in range(4)]

    def file(self, directory: Path) -> Path:
        """The one file of this rank that `write` made in `directory` with one stream."""
        return directory / f"{self.rank.rank}-0"

    def write(self, directory: Path, way: Way, size: int | None = None) -> None:
        """Writes `size` bytes (default: all) to new files in `directory`, durably."""
        directory.mkdir(parents=True, exist_ok=True)
        shares = _shares(size or self.size, way.streams)
        self._each(
            way, lambda i: self._write_one(directory / f"{self.rank.rank}-{i}", way, i, shares[i])
        )
        sync(directory)

    def read(
        self, file: Path, way: Way, size: int | None = None, into: memoryview | None = None
    ) -> None:
        """Reads the first `size` bytes (default: all) of `file`, a part of it in each stream.

        `into`: memory for all of them, since whoever loads keeps what is read. Else each stream reads into one buffer,
        over and over, which stays in the processor's cache: no load can do that.
        """
        shares = _shares(size or self.size, way.streams)
        self._each(way, lambda i: self._read_one(file, way, i, sum(shares[:i]), shares[i], into))

    def best_way_to_write(self, directory: Path) -> Way:
        """Collective: all ranks try and return the same way."""
        size = min(self.size, TRIAL_BYTES)

        def trial(way: Way) -> float:
            seconds = self.rank.timed(lambda: self.write(directory, way, size))
            self.rank.on_first(lambda: remove_and_settle(directory))
            return seconds

        return _best(WRITE_WAYS, trial)

    def best_way_to_read(self, file: Path, *, direct: bool) -> Way:
        """Collective: all ranks try and return the same way. `file` is this rank's own."""
        ways = [replace(way, direct=direct) for way in READ_WAYS]
        size = min(self.size, TRIAL_BYTES)

        def trial(way: Way) -> float:
            make_cold(file)
            return self.rank.timed(lambda: self.read(file, way, size))

        return _best(ways, trial)

    def _each(self, way: Way, stream: Callable[[int], None]) -> None:
        if way.streams == 1:
            stream(0)
            return
        with ThreadPoolExecutor(way.streams) as pool:
            list(pool.map(stream, range(way.streams)))

    def _write_one(self, file: Path, way: Way, stream: int, size: int) -> None:
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_DIRECT
        descriptor = os.open(file, flags, 0o644)
        buffer = self._buffers[stream]
        try:
            for offset in range(0, size, way.block):
                _write_fully(descriptor, buffer[: min(way.block, size - offset)], offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read_one(
        self, file: Path, way: Way, stream: int, start: int, size: int, into: memoryview | None
    ) -> None:
        descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if way.direct else 0))
        try:
            for offset in range(0, size, way.block):
                buffer = self._buffers[stream] if into is None else into[start + offset :]
                part = buffer[: min(way.block, size - offset)]
                if os.preadv(descriptor, [part], start + offset) != len(part):
                    raise OSError(f"{file}: {len(part)} bytes expected at {start + offset}")
        finally:
            os.close(descriptor)


def copy_into(target: torch.Tensor, parts: Iterable[torch.Tensor]) -> None:
    """Copies tensors piece by piece into one buffer of bytes, which has been touched before and is used again."""
    for part in parts:
        for piece in part.reshape(-1).view(torch.uint8).split(target.numel()):
            target[: piece.numel()].copy_(piece, non_blocking=True)  # a copy on one CPU never is


def copy_durably(source: Path, target: Path) -> None:
    """`cp source target` and fsync of the file and its folder."""
    subprocess.run(["cp", os.fspath(source), os.fspath(target)], check=True)
    sync(target)
    sync(target.parent)
    if bytes_under(target) != bytes_under(source):
        raise OSError(f"{target}: its length differs from {source}")


def _best(ways: list[Way], trial: Callable[[Way], float]) -> Way:
    seconds = {way: min(trial(way) for _ in range(TRIALS)) for way in ways}
    return min(ways, key=lambda way: seconds[way])


def _shares(size: int, streams: int) -> list[int]:
    """`size` bytes in `streams` parts of whole blocks, in order."""
    blocks = size // BLOCK
    cuts = [blocks * i // streams * BLOCK for i in range(streams + 1)]
    return [end - start for start, end in pairwise(cuts)]


def touched_buffer(size: int) -> memoryview:
    """Memory that the system has given already, on huge pages where there are any."""
    buffer = aligned_buffer(size)
    for at in range(0, size, BLOCK):
        buffer[at] = 1
    return buffer


def _filled_buffer(size: int) -> memoryview:
    """Touched, on huge pages where there are any; random, so that no layer below can shorten it."""
    buffer = aligned_buffer(size)
    buffer[:] = os.urandom(size)
    return buffer


def _write_fully(descriptor: int, part: memoryview, offset: int) -> None:
    if os.pwrite(descriptor, part, offset) != len(part):
        raise OSError(f"short raw write of {len(part)} bytes at {offset}")
