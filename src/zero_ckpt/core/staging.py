"""Copies live tensors into aligned host buffers and writes them, with their checksums, as one shard file.

While one buffer of a pool is written, the next is filled. Extra memory of a save is `StagingPool.nbytes`, whatever the
state's size.

What is staged is all that live tensors have to wait for. So bytes in host memory are hashed as they are copied, in
pieces that still lie in the processor's cache; bytes of an accelerator are hashed by the threads that write them, and
its copies follow one another without a pause.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
import xxhash

from zero_ckpt.core.buffers import StagingPool, WriteThreads, address_of_buffer
from zero_ckpt.core.memory import ALIGNMENT, WINDOW, round_up
from zero_ckpt.core.shard_file import BLOCK, Chunk, ShardLayout
from zero_ckpt.core.sources import Source
from zero_ckpt.core.storage import FileWriter

__all__ = ["ShardWrite", "reading_after"]


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
        self._writer, self._layout, self._pool, self._progress = writer, layout, pool, progress
        self._checksums = [0] * -(-layout.data_bytes // BLOCK)
        self._rest = b""
        """Of the data, behind the last multiple of `ALIGNMENT`: written together with the block table."""
        self._threads = WriteThreads(writer, pool, progress)
        try:
            self._put_header()
            self._stage(_Filler(layout, sources))
        except BaseException:
            with suppress(BaseException):  # the error that stopped the staging is the one to tell
                self._threads.join()
            raise

    def join(self) -> bytes:
        """Wait until header, data and block table are written; returns the table's bytes.

        The file is not finished: the caller syncs it. Raises what the storage raised.
        """
        self._threads.join()
        table = b"".join(checksum.to_bytes(8, "little") for checksum in self._checksums)
        self._write_end(self._rest + table)
        return table

    def _put_header(self) -> None:
        header = self._layout.header
        for start in range(0, len(header), BLOCK):
            part = header[start : start + BLOCK]
            buffer = self._pool.take()
            buffer[: len(part)] = part
            self._threads.put(start, buffer, len(part))

    def _stage(self, filler: _Filler) -> None:
        head, size = len(self._layout.header), self._layout.data_bytes
        for index in range(len(self._checksums)):
            if self._threads.error is not None:
                break
            start, buffer = index * BLOCK, self._pool.take()
            nbytes = min(BLOCK, size - start)
            try:
                checksum = filler.fill(buffer, nbytes)
            except BaseException:
                with suppress(BaseException):
                    filler.wait()
                self._pool.give(buffer)  # a pool that runs empty would stop the next save for ever
                raise
            whole = nbytes - nbytes % ALIGNMENT
            note = partial(self._note, index, checksum, buffer[whole:nbytes])
            self._threads.put(head + start, buffer, whole, before=note)
        filler.wait()

    def _note(self, index: int, checksum: Callable[[], int], rest: memoryview) -> None:
        self._checksums[index] = checksum()
        if rest:
            self._rest = bytes(rest)

    def _write_end(self, data: bytes) -> None:
        """Write the last bytes of the file. A buffer that waited for them would be missed elsewhere."""
        at = len(self._layout.header) + self._layout.data_bytes - len(self._rest)
        for start in range(0, len(data), BLOCK):
            part, buffer = data[start : start + BLOCK], self._pool.take()
            try:
                buffer[: len(part)] = part
                self._writer.write(at + start, buffer[: round_up(len(part))])
            finally:
                self._pool.give(buffer)
            self._progress()


class _Filler:
    """Walks the chunks in order and fills block after block."""

    def __init__(self, layout: ShardLayout, sources: Sequence[Source]) -> None:
        self._chunks: Sequence[Chunk] = layout.chunks
        self._sources = sources
        self._index = 0
        self._at = 0
        self._is_far = any(source.is_far for source in sources)
        self._touched: dict[torch.device, Source] = {}

    def fill(self, buffer: memoryview, nbytes: int) -> Callable[[], int]:
        """Fill the first `nbytes` of `buffer` with the next bytes of the data. Returns what gives their XXH3-64.

        Bytes of an accelerator may still be on their way: they are there when the checksum is.
        """
        address = address_of_buffer(buffer)
        if self._is_far:  # such copies are slow to begin: few long ones
            self._fill_window(address, nbytes)
            return partial(_checksum_after, self._copied(), buffer[:nbytes])
        hasher = xxhash.xxh3_64()
        for start in range(0, nbytes, WINDOW):
            stop = min(start + WINDOW, nbytes)
            self._fill_window(address + start, stop - start)
            hasher.update(buffer[start:stop])
        return hasher.intdigest

    def wait(self) -> None:
        """Return when all that was begun is copied."""
        _wait_for(self._copied())

    def _copied(self) -> list[Any]:
        return [source.copied() for source in self._touched.values()]

    def _fill_window(self, address: int, nbytes: int) -> None:
        chunks, stop = self._chunks, self._at + nbytes
        while self._at < stop and self._index < len(chunks):
            chunk = chunks[self._index]
            end = min(chunk.end, stop)
            if end > self._at:
                source = self._sources[self._index]
                if self._is_far:
                    self._touched[source.device] = source  # before: it may fail half-way
                source.copy_to(address, self._at - chunk.begin, end - chunk.begin, wait=False)
                address, self._at = address + end - self._at, end
            if end < chunk.end:
                return
            self._index += 1
        if self._at < stop:  # padding behind the last chunk
            ctypes.memset(address, 0, stop - self._at)
            self._at = stop


def _checksum_after(events: Iterable[Any], data: memoryview) -> int:
    _wait_for(events)
    return xxhash.xxh3_64_intdigest(data)


def _wait_for(events: Iterable[Any]) -> None:
    for event in events:
        if event is not None:
            event.synchronize()
