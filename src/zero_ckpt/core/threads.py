"""Starting threads where memory is scarce. Imports no torch."""

from __future__ import annotations

import mmap
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

from zero_ckpt.core.memory import round_up
from zero_ckpt.errors import describe

__all__ = ["start_thread", "thread_pool"]

_STACK = 8 << 20
"""Bytes of address space that a thread takes where the system sets no limit of its own."""

_BEGINNING = 4 << 20
"""Bytes that Python may need until a new thread runs: its memory pools grow by 1 MiB at a time."""


def start_thread(thread: threading.Thread) -> None:
    """Start `thread`, or raise MemoryError.

    Python waits for ever for a thread that finds no memory to begin with. So this looks for room first.
    """
    try:
        _check_room(1)
        thread.start()
    except (OSError, RuntimeError) as error:
        raise MemoryError(f"no room for another thread: {describe(error)}") from error


def thread_pool(count: int, name: str) -> ThreadPoolExecutor:
    """An executor of `count` threads called `name`, or of as many as there is room for.

    Raises MemoryError when there is none for even one.
    """
    for threads in range(count, 0, -1):
        try:
            _check_room(threads)
            return ThreadPoolExecutor(threads, thread_name_prefix=name)
        except OSError as error:
            problem = error
    raise MemoryError(f"no room for a thread: {describe(problem)}") from problem


def _check_room(threads: int) -> None:
    """Raises OSError when the process may not have the memory that so many threads begin with."""
    nbytes = round_up(threads * (_stack_bytes() + _BEGINNING))
    mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


def _stack_bytes() -> int:
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return threading.stack_size() or (_STACK if soft == resource.RLIM_INFINITY else soft)
