"""Copies live tensors into aligned host buffers, hashing in the same pass, and writes them as one shard file.

A few block-sized buffers are made once and reused by every save, since fresh memory costs more to touch than the copy
into it: while one buffer is written, the next is filled. Extra memory of a save is `StagingPool.nbytes`, whatever the
state's size. Small pieces are hashed while they still lie in the processor's cache.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import xxhash

from zero_ckpt.core.memory import WINDOW, aligned_buffer, round_up
from zero_ckpt.core.shard_file import BLOCK, Chunk, ShardLayout
from zero_ckpt.core.sources import Source
from zero_ckpt.core.storage import FileWriter
from zero_ckpt.core.threads import start_thread

__all__ = ["ShardWrite", "StagingPool", "WriteThreads", "reading_after"]

_WRITE_THREADS = 2
"""Writes in flight of one file: while the disk works on one, the system prepares the next."""


class StagingPool:
    """Reusable aligned buffers of one block each, for any thread. They are pinned when a CUDA `device` is given."""

    def __init__(self, count: int = 6, device: torch.device | None = None) -> None:
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._memory: list[memoryview] = []
        self.device, self._growing = device, threading.Lock()
        self.grow(count)

    @property
    def count(self) -> int:
        return len(self._memory)

    @property
    def nbytes(self) -> int:
        return self.count * BLOCK

    def grow(self, count: int) -> None:
        """Have at least `count` buffers. Each is touched here, so that the first save does not wait for memory."""
        while self.count < count:
            with self._growing:
                self._add()

    def _add(self) -> None:
        memory = aligned_buffer(BLOCK)
        ctypes.memset(_address(memory), 0, BLOCK)
        if self.device is not None:
            with torch.cuda.device(self.device):  # a thread of its own begins on the first device
                torch.cuda.check_error(_cuda().cudaHostRegister(_address(memory), BLOCK, 0))
            # The system may give the same addresses to others when the memory has been freed.
            weakref.finalize(self, _unpin, memory).atexit = False
        self._memory.append(memory)
        self._free.put(memory)

    def take(self) -> memoryview:
        return self._free.get()

    def give(self, buffer: memoryview) -> None:
        self._free.put(buffer)


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unpin(memory: memoryview) -> None:
    _cuda().cudaHostUnregister(_address(memory))


def _address(memory: object) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))  # type: ignore[arg-type]


class WriteThreads:
    """Writes buffers on threads of its own, so that the next is filled meanwhile."""

    def __init__(self, writer: FileWriter, pool: StagingPool, progress: Callable[[], None]) -> None:
        self._writer, self._pool, self._progress = writer, pool, progress
        self._queue: queue.SimpleQueue[tuple[int, memoryview, int] | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"zero_ckpt-write-{i}", daemon=True)
            for i in range(_WRITE_THREADS)
        ]
        for started, thread in enumerate(self._threads):
            try:
                start_thread(thread)
            except MemoryError:
                if not started:
                    raise
                del self._threads[started:]  # one is enough

    def put(self, offset: int, buffer: memoryview, nbytes: int) -> None:
        self._queue.put((offset, buffer, nbytes))

    def join(self) -> None:
        """Wait until all is written; raises what writing raised."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            offset, buffer, nbytes = item
            try:
                if self.error is None:
                    self._writer.write(offset, buffer[: round_up(nbytes)])
                    self._progress()
            except BaseException as error:
                self.error = error
            finally:
                self._pool.give(buffer)


@contextmanager
def reading_after(events: Sequence[Any]) -> Iterator[None]:
    """Inside, this thread copies from CUDA devices on streams of its own, beside the training, after `events`."""
    with ExitStack() as streams:
        for event in events:
            stream = torch.cuda.Stream(event.device)  # type: ignore[no-untyped-call]
            stream.wait_event(event)
            streams.enter_context(torch.cuda.stream(stream))
        yield


class ShardWrite:
    """One file on its way: made when all its bytes are staged, while its threads still write them.

    `sources` are in the layout's order. `join` must be called, whatever happens.
    """

    def __init__(
        self,
        writer: FileWriter,
        layout: ShardLayout,
        sources: Sequence[Source],
        pool: StagingPool,
        progress: Callable[[], None],
    ) -> None:
        self._threads = WriteThreads(writer, pool, progress)
        try:
            self._table = _stage(self._threads, layout, sources, pool)
        except BaseException:
            with suppress(BaseException):  # the error that stopped the staging is the one to tell
                self._threads.join()
            raise

    def join(self) -> bytes:
        """Wait until header, data and block table are written; returns the table's bytes.

        The file is not finished: the caller syncs it. Raises what the storage raised.
        """
        self._threads.join()
        return self._table


def _stage(
    threads: WriteThreads, layout: ShardLayout, sources: Sequence[Source], pool: StagingPool
) -> bytes:
    head = len(layout.header)
    for start in range(0, head, BLOCK):
        part = layout.header[start : start + BLOCK]
        buffer = pool.take()
        buffer[: len(part)] = part
        threads.put(start, buffer, len(part))
    filler = _Filler(layout, sources)
    table = bytearray()
    for start in range(0, layout.data_bytes, BLOCK):
        if threads.error is not None:
            break
        buffer = pool.take()
        nbytes = min(BLOCK, layout.data_bytes - start)
        try:
            table += filler.fill(buffer, nbytes).to_bytes(8, "little")
        except BaseException:
            pool.give(buffer)  # a pool that runs empty would stop the next save for ever
            raise
        if nbytes == BLOCK:
            threads.put(head + start, buffer, nbytes)
        else:
            _put_tail(threads, pool, head + start, buffer, nbytes, table)
    if layout.data_bytes % BLOCK == 0:
        _put_tail(threads, pool, head + layout.data_bytes, pool.take(), 0, table)
    return bytes(table)


def _put_tail(
    threads: WriteThreads,
    pool: StagingPool,
    offset: int,
    buffer: memoryview,
    filled: int,
    table: bytearray,
) -> None:
    """Write the last part: what `buffer` holds already, followed by the block table."""
    at = 0
    while True:
        part = table[at : at + BLOCK - filled]
        buffer[filled : filled + len(part)] = part
        threads.put(offset, buffer, filled + len(part))
        at += len(part)
        if at >= len(table):
            return
        offset, filled, buffer = offset + BLOCK, 0, pool.take()


class _Filler:
    """Walks the chunks in order and fills block after block."""

    def __init__(self, layout: ShardLayout, sources: Sequence[Source]) -> None:
        self._chunks: Sequence[Chunk] = layout.chunks
        self._sources = sources
        self._index = 0
        self._at = 0
        # Copies from an accelerator are slow to begin: make few long ones.
        self._window = BLOCK if any(source.is_far for source in sources) else WINDOW

    def fill(self, buffer: memoryview, nbytes: int) -> int:
        """Fill the first `nbytes` of `buffer` with the next bytes of the data; return their XXH3-64."""
        address = _address(buffer)
        hasher = xxhash.xxh3_64()
        for start in range(0, nbytes, self._window):
            stop = min(start + self._window, nbytes)
            self._fill_window(address + start, stop - start)
            hasher.update(buffer[start:stop])
        return hasher.intdigest()

    def _fill_window(self, address: int, nbytes: int) -> None:
        chunks, stop = self._chunks, self._at + nbytes
        while self._at < stop and self._index < len(chunks):
            chunk = chunks[self._index]
            end = min(chunk.end, stop)
            if end > self._at:
                self._sources[self._index].copy_to(
                    address, self._at - chunk.begin, end - chunk.begin
                )
                address, self._at = address + end - self._at, end
            if end < chunk.end:
                return
            self._index += 1
        if self._at < stop:  # padding behind the last chunk
            ctypes.memset(address, 0, stop - self._at)
            self._at = stop
