"""Block-sized host buffers that every save uses again, and threads that write them to a file.

Fresh memory costs more to touch than a copy into it: so buffers are made once, touched and, for copies from a CUDA
device, pinned. Whoever takes one gives it back, or hands it to threads that do.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from zero_ckpt.core.memory import aligned_buffer, round_up
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.storage import FileWriter
from zero_ckpt.core.threads import start_thread

__all__ = ["StagingPool", "WriteThreads", "address_of_buffer"]

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
        ctypes.memset(address_of_buffer(memory), 0, BLOCK)
        if self.device is not None:
            with torch.cuda.device(self.device):  # a thread of its own begins on the first device
                torch.cuda.check_error(
                    _cuda().cudaHostRegister(address_of_buffer(memory), BLOCK, 0)
                )
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
    _cuda().cudaHostUnregister(address_of_buffer(memory))


def address_of_buffer(memory: object) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))  # type: ignore[arg-type]


_Item = tuple[int, memoryview, int, Callable[[], None]]


class WriteThreads:
    """Writes buffers on threads of its own, so that the next is filled meanwhile."""

    def __init__(self, writer: FileWriter, pool: StagingPool, progress: Callable[[], None]) -> None:
        self._writer, self._pool, self._progress = writer, pool, progress
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
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

    def put(
        self,
        offset: int,
        buffer: memoryview,
        nbytes: int,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the first `nbytes` of `buffer` and give it back to the pool, after a call of `before`, on a thread."""
        self._queue.put((offset, buffer, nbytes, before))

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
            offset, buffer, nbytes, before = item
            try:
                before()  # also after an error: until it returns, a device may still fill the buffer
                if self.error is None and nbytes:
                    self._writer.write(offset, buffer[: round_up(nbytes)])
                    self._progress()
            except BaseException as error:
                self.error = error
            finally:
                self._pool.give(buffer)
