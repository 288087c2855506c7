"""Reads every byte of a checkpoint and says what differs from what was saved. Imports no torch, changes nothing.

For each file that the manifest lists it checks presence, length, the checksum of header and block table, that the
header agrees with the manifest, and every data block. Damage never stops it: the rest is read all the same.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from zero_ckpt.core.foreign import ForeignManifest
from zero_ckpt.core.manifest import FileRecord, Manifest
from zero_ckpt.core.memory import aligned_buffer
from zero_ckpt.core.shard_file import BLOCK, REMEDY
from zero_ckpt.core.shard_reader import ShardReader, open_shard
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.threads import thread_pool
from zero_ckpt.errors import CorruptShardError

__all__ = ["Verifier", "cause_unread"]

READ_THREADS = 4
"""Blocks in flight."""


class Verifier:
    """Verifies checkpoints one after the other with a few threads. Use it in a `with` statement.

    `progress` is called with the number of bytes that were read or passed over, from any thread; `bytes_read` counts
    the bytes of the files that were read. `unread`: why something could not be read, which may be otherwise another
    time.
    """

    def __init__(self, storage: Storage, progress: Callable[[int], None] = lambda _: None) -> None:
        self._storage, self._progress = storage, progress
        self.bytes_read = 0
        self.unread: OSError | None = None
        self._stop = threading.Event()
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(READ_THREADS):
            self._buffers.put(aligned_buffer(BLOCK))
        self._pool = thread_pool(READ_THREADS, "zero_ckpt-verify")

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()  # after Ctrl-C the threads must not read on to the end of the file
        self._pool.shutdown()

    def damage(self, folder: str, manifest: Manifest) -> Iterator[str]:
        """All damage of the checkpoint in `folder`, in the order of files: lines that start with the file's name."""
        if isinstance(manifest, ForeignManifest):
            yield from manifest.content.damage(self._count)
            return
        for name, record in sorted(manifest.files.items()):
            yield from self._file_damage(folder, name, record, manifest)

    def _count(self, nbytes: int) -> None:
        self.bytes_read += nbytes
        self._progress(nbytes)

    def _file_damage(
        self, folder: str, name: str, record: FileRecord, manifest: Manifest
    ) -> Iterator[str]:
        try:
            reader = open_shard(self._storage, f"{folder}/{name}", record, name)
        except (OSError, CorruptShardError) as error:
            self._progress(record.nbytes)
            self.unread = self.unread or cause_unread(error)
            yield _describe(name, error)
            return
        try:
            self._progress(record.nbytes - reader.data_bytes)
            yield from _disagreements(reader, manifest)
            yield from self._block_damage(reader)
            self.bytes_read += record.nbytes
        finally:
            reader.close()

    def _block_damage(self, reader: ShardReader) -> list[str]:
        """Each thread takes every n-th block, so that the disk sees one ascending stream."""
        count = min(READ_THREADS, reader.num_blocks)
        shares = [range(i, reader.num_blocks, count) for i in range(count)]
        tasks = [self._pool.submit(self._check_blocks, reader, share) for share in shares]
        return [text for _, text in sorted(bad for task in tasks for bad in task.result())]

    def _check_blocks(self, reader: ShardReader, indices: range) -> list[tuple[int, str]]:
        """(index, what is wrong) of the blocks that are not as saved."""
        found = []
        buffer = self._buffers.get()
        try:
            for index in indices:
                if self._stop.is_set():
                    break
                try:
                    reader.read_block(index, buffer)
                except (OSError, CorruptShardError) as error:
                    self.unread = self.unread or cause_unread(error)
                    found.append((index, _describe(reader.name, error, f"block {index}: ")))
                self._progress(reader.block_bytes(index))
        finally:
            self._buffers.put(buffer)
        return found


def cause_unread(error: Exception) -> OSError | None:
    """What the system failed with, so that nothing is known of what is there; None when it is known to be damaged."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return (
        cause if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) else None
    )


def _describe(name: str, error: Exception, where: str = "") -> str:
    if isinstance(error, OSError):
        return f"{name}: {where}cannot be read: {error.strerror or error}"
    return str(error).replace(REMEDY, "").rstrip(" .")


def _disagreements(reader: ShardReader, manifest: Manifest) -> Iterator[str]:
    """A line for each chunk that the manifest places in this file and that the header lacks or describes otherwise."""
    role, number = reader.name.split("-")[:2]
    rank = int(number)
    for key, placed in manifest.tensors[role].items():
        for run in placed.runs:
            if rank not in run.ranks():
                continue
            try:
                chunk = reader.find(key, run.chunk(run.ranks().index(rank))[1])
            except CorruptShardError as error:
                yield _describe(reader.name, error)
                continue
            if (chunk.dtype, chunk.shape) != (placed.dtype, placed.shape):
                yield (
                    f"{reader.name}: tensor '{key}': {placed.dtype} {list(placed.shape)} expected by the manifest, "
                    f"{chunk.dtype} {list(chunk.shape)} found"
                )
