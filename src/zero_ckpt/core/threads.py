"""Starting threads where memory is scarce. Imports no torch."""

from __future__ import annotations

import mmap
import resource
import threading

from zero_ckpt.core.memory import round_up
from zero_ckpt.errors import describe

__all__ = ["start_thread"]

_STACK = 8 << 20
"""Bytes of address space that a thread takes where the system sets no limit of its own."""

_BEGINNING = 4 << 20
"""Bytes that Python may need until a new thread runs: memory pools of its own grow by 1 MiB."""


def start_thread(thread: threading.Thread) -> None:
    """Start it, or raise MemoryError.

    Python waits for ever for a thread that found no memory to begin with. So there must be room before it is asked.
    """
    try:
        room = round_up(_stack_bytes() + _BEGINNING)
        mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        thread.start()
    except (OSError, RuntimeError) as error:
        raise MemoryError(f"no room for another thread: {describe(error)}") from error


def _stack_bytes() -> int:
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return threading.stack_size() or (_STACK if soft == resource.RLIM_INFINITY else soft)
