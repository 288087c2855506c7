"""Who writes which bytes of an export, and the writing of one rank's share.

A lane is what one thread writes: parts of files, front to back. A process that works alone has two lanes, so that one
assembles while the other waits for the disk; of several ranks each has one. A file that several lanes write to is
created before they begin.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import as_completed

from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.threads import thread_pool
from zero_ckpt.fp32.assembly import Assembler, BlockCache
from zero_ckpt.fp32.checksums import Checksums
from zero_ckpt.fp32.contents import Contents
from zero_ckpt.fp32.journal import Journal, NotedWriter
from zero_ckpt.fp32.layout import divide
from zero_ckpt.fp32.writing import WINDOW, write_range

__all__ = ["Lane", "Progress", "ShareWriter", "lanes_of", "shared_files"]

Progress = Callable[[int, int], None]

Part = tuple[int, int, int]
"""(file, begin, end) of bytes to write."""

Lane = list[Part]

LANES = 2
"""Lanes of a process that works alone."""

BUFFERS = 3
"""Buffers of a lane: one is filled while two are written. More would only take memory, which is slow when fresh."""

WORTHWHILE_BLOCKS = 4
"""Blocks to write per shard file that make another lane worthwhile, as each lane reads from all shard files."""


def lanes_of(
    contents: Contents, world_size: int, finished: Collection[int] = ()
) -> list[list[Lane]]:
    """The lanes of each rank. `finished`: files that nobody has to write.

    Whole files are divided among the ranks where an object has one writer, or where files hold checksums and ranks do
    not know each other's; elsewhere bytes are.
    """
    sizes = [
        0 if file in finished else contents.layout(file).nbytes
        for file in range(len(contents.names))
    ]
    if contents.has_one_writer or (contents.has_checksums and world_size > 1):
        files = [file for file in range(len(sizes)) if file not in finished]
        return [[[(f, 0, sizes[f]) for f in files[r::world_size]]] for r in range(world_size)]
    count = LANES if world_size == 1 else 1
    least = WORTHWHILE_BLOCKS * BLOCK * contents.num_sources
    workers = min(world_size * count, max(1, sum(sizes) // max(1, least)))
    parts = [*divide(sizes, workers, WINDOW), *([] for _ in range(workers, world_size * count))]
    return [parts[rank * count : (rank + 1) * count] for rank in range(world_size)]


def shared_files(lanes: list[list[Lane]]) -> list[int]:
    """Files that more than one lane writes parts of."""
    writers = Counter(file for own in lanes for lane in own for file, _, _ in lane)
    return [file for file, count in writers.items() if count > 1]


class ShareWriter:
    """Writes one rank's lanes into the journal's files, and notes what is durable of each of several.

    `advance(done, total)`: bytes of this share, after each window, on any thread, one at a time.
    """

    def __init__(
        self, storage: Storage, contents: Contents, journal: Journal, advance: Progress
    ) -> None:
        self._storage, self._contents, self._journal = storage, contents, journal
        self._advance = advance
        self._checksums: dict[int, Checksums] = {}

    def write(self, lanes: list[list[Lane]], rank: int) -> None:
        """Raises what reading or writing raised."""
        own, shared = lanes[rank], shared_files(lanes)
        self._checksums = {
            f: Checksums(self._contents.layout(f)) for lane in own for f, _, _ in lane
        }
        meter = _Meter(sum(end - begin for lane in own for _, begin, end in lane), self._advance)
        waiting: Lane = []
        with thread_pool(len(own), "zero_ckpt-export") as pool:
            running = [pool.submit(self._write_lane, lane, shared, meter) for lane in own]
            try:
                for done in as_completed(running):
                    waiting += done.result()
            except BaseException:
                meter.stop()
                raise
        self._write_lane(sorted(waiting), shared, meter)

    def _write_lane(self, lane: Lane, shared: list[int], meter: _Meter) -> Lane:
        """Returns what has to wait for checksums of other lanes."""
        cache, pool = BlockCache(self._contents.num_sources), StagingPool(BUFFERS)
        waiting: Lane = []
        for file, begin, end in lane:
            layout, name = self._contents.layout(file), self._contents.names[file]
            path, is_shared = self._journal.path(name), file in shared
            writer = self._storage.create(path, layout.nbytes, shared=is_shared)
            noted = NotedWriter(writer, layout.nbytes) if len(self._contents.names) > 1 else None
            try:
                assembler = Assembler(self._contents.checkpoint.shards, cache, layout)
                sums = self._checksums[file]
                left = write_range(noted or writer, assembler, sums, begin, end, pool, meter.add)
                writer.finish(layout.nbytes)
            except BaseException:
                writer.abort()
                raise
            if noted is not None:
                self._journal.note(name, noted.sums)
            waiting += [(file, start, min(start + WINDOW, end)) for start in left]
        return waiting


class _Meter:
    """Counts what all lanes of this rank have written, and stops them all."""

    def __init__(self, total: int, advance: Progress) -> None:
        self._total, self._advance, self._done = total, advance, 0
        self._lock, self._stopped = threading.Lock(), False

    def add(self, nbytes: int) -> bool:
        """Count `nbytes` more. Returns whether to go on."""
        with self._lock:
            self._done += nbytes
            self._advance(self._done, self._total)
            return not self._stopped

    def stop(self) -> None:
        self._stopped = True
