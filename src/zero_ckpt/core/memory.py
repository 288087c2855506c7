"""Host memory: how much there is, buffers for direct I/O, and copies between raw addresses.

Knows no tensors. Whoever copies must see to it that both ranges exist and are long enough.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from zero_ckpt.core.cgroups import bytes_to_limit

__all__ = [
    "ALIGNMENT",
    "WINDOW",
    "advise",
    "aligned_buffer",
    "available_bytes",
    "copy_bytes",
    "free_share",
    "prefer_huge_pages",
    "round_up",
]

ALIGNMENT = 4096
"""Bytes. Offsets, lengths and addresses of data I/O are multiples of it."""

WINDOW = 512 << 10
"""Bytes that are worked on at a time: they fit a core's second-level cache."""

_HUGE_PAGE = 2 << 20

_HELD = 64 << 10
"""Bytes. For a shorter copy, releasing the interpreter lock and getting it back costs more than the copy itself."""

_memmove_held = ctypes.PYFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)


def round_up(nbytes: int, unit: int = ALIGNMENT) -> int:
    return -(-nbytes // unit) * unit


def aligned_buffer(nbytes: int) -> memoryview:
    """Fresh memory of at least `nbytes`, page-aligned, a multiple of `ALIGNMENT` long.

    On huge pages where the system has them: a disk is asked for one piece of memory instead of hundreds, and the memory
    is cheap to touch. Only private memory gets them, which `mmap` does not give unless asked.
    """
    nbytes = max(round_up(nbytes), ALIGNMENT)
    slack = _HUGE_PAGE if nbytes >= _HUGE_PAGE else 0
    try:
        memory = mmap.mmap(-1, nbytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for a buffer of {nbytes} bytes: {error.strerror}") from error
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE if slack else 0
    if slack and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[start : start + nbytes]


def prefer_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages where this memory, not touched yet, has room for whole ones. A hint: it may fail."""
    start, stop = round_up(address, _HUGE_PAGE), (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if start < stop and hasattr(mmap, "MADV_HUGEPAGE"):
        advise(start, stop - start, mmap.MADV_HUGEPAGE)


def advise(address: int, nbytes: int, advice: int) -> bool:
    """madvise(2) of memory that is known by its address; whether the system took the advice."""
    madvise = _madvise()
    return madvise is not None and madvise(address, nbytes, advice) == 0


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # no such call on this system
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    typed: Callable[[int, int, int], int] = found
    return typed


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copy `nbytes` from address `source` to address `target`. Other threads run meanwhile when it takes long."""
    (_memmove_held if nbytes < _HELD else ctypes.memmove)(target, source, nbytes)


def free_share(world_size: int) -> int:
    """Bytes that one rank may take for a while without being asked to: its part of a quarter of the host's free memory.

    Divided by the number of ranks on this host, or by `world_size` where the launcher does not tell that.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    return available_bytes() // 4 // ranks


def available_bytes() -> int:
    """Host memory that can be had without swapping, or without reaching this container's limit where it has one."""
    return min(_of_host(), bytes_to_limit())


def _of_host() -> int:
    """The host's available memory, or all of its memory where the system does not tell what is available."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
