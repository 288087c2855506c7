"""Reading blocks with a few threads: some fetch, others work on what has come, so no disk waits for a processor.

Memory is `_BUFFERS` blocks, whatever there is to read. Where there is no room for threads or buffers, one thread does
all of it with one buffer: the step that overwrites live tensors must not fail for that.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

from zero_ckpt.core.memory import aligned_buffer
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.threads import start_thread

__all__ = ["run_pipeline"]

_FETCHERS, _WORKERS, _BUFFERS = 4, 3, 6
"""Threads that read, threads that verify and copy, and the blocks that they hold between them."""


class Work(Protocol):
    """One block to read."""

    def fetch(self, buffer: memoryview) -> memoryview | None:
        """The block, read into `buffer`; None when the action reads it, which the fetching thread then does itself."""


W = TypeVar("W", bound=Work)

Action = Callable[[W, memoryview, "memoryview | None"], None]


def run_pipeline(
    blocks: Sequence[W], action: Action[W], progress: Callable[[], None], *, one_of_each: bool
) -> None:
    """Do `action(work, buffer, what was fetched)` with all blocks; the first error stops the rest and is raised.

    `one_of_each`: one thread fetches and one works, since more would only contend for the interpreter.
    """
    counts = (1, 1) if one_of_each else (_FETCHERS, _WORKERS)
    if len(blocks) > 1 and _Pipeline(blocks, action, progress, *counts).run():
        return
    for item in blocks:
        with torch.no_grad(), _buffers(1) as (buffer,):
            action(item, buffer, item.fetch(buffer))
        progress()


class _Pipeline(Generic[W]):
    def __init__(
        self,
        blocks: Sequence[W],
        action: Action[W],
        progress: Callable[[], None],
        fetchers: int,
        workers: int,
    ) -> None:
        self._todo, self._lock = iter(blocks), threading.Lock()
        self._action, self._progress = action, progress
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[W, memoryview, memoryview | None] | None]
        self._ready = queue.SimpleQueue()
        self._fetchers, self._workers = fetchers, workers
        self._fetching = fetchers
        self._error: BaseException | None = None
        self._stop = threading.Event()

    def run(self) -> bool:
        """Whether there was room for the threads; without it nothing was done. Raises the first error of any thread."""
        targets = [self._fetch] * self._fetchers + [self._work] * self._workers
        threads = [threading.Thread(target=each, name="zero_ckpt-read") for each in targets]
        try:
            with _buffers(_BUFFERS) as buffers:
                for buffer in buffers:
                    self._free.put(buffer)
                self._run_all(threads)
        except MemoryError:
            return False
        if self._error is not None:
            raise self._error
        return True

    def _run_all(self, threads: Sequence[threading.Thread]) -> None:
        try:
            for thread in threads:
                start_thread(thread)
            for thread in threads:
                thread.join()
        finally:  # after Ctrl-C, or without room for all, they must neither read on to the end nor wait for a buffer
            self._stop.set()
            for _ in range(self._fetchers):
                self._free.put(memoryview(b""))
            for thread in filter(threading.Thread.is_alive, threads):
                thread.join()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._stop.set()

    def _fetch(self) -> None:
        while True:
            buffer = self._free.get()
            with self._lock:
                item = None if self._stop.is_set() else next(self._todo, None)
            if item is None:
                break
            try:
                fetched = item.fetch(buffer)
            except BaseException as error:
                self._fail(error)
                break
            if fetched is None:
                self._act(item, buffer, None)
            else:
                self._ready.put((item, buffer, fetched))
        self._free.put(buffer)
        with self._lock:
            self._fetching -= 1
            if not self._fetching:
                self._ready.put(None)

    def _work(self) -> None:
        while (found := self._ready.get()) is not None:
            self._act(*found)
        self._ready.put(None)  # for the other workers

    def _act(self, item: W, buffer: memoryview, fetched: memoryview | None) -> None:
        try:
            if not self._stop.is_set():
                with torch.no_grad():
                    self._action(item, buffer, fetched)
                self._progress()
        except BaseException as error:
            self._fail(error)
        self._free.put(buffer)


@contextmanager
def _buffers(count: int) -> Iterator[list[memoryview]]:
    """Block-sized buffers, reused between loads."""
    found: list[memoryview] = []
    try:
        while len(found) < count:
            found.append(_taken())
        yield found
    finally:
        _spare.extend(found)


_spare: list[memoryview] = []


def _taken() -> memoryview:
    try:
        return _spare.pop()
    except IndexError:  # not asked before: another load may take the last one in between
        return aligned_buffer(BLOCK)
