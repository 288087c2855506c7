"""Host memory: how much there is, and copies between raw addresses.

Knows no tensors; who copies answers for both ranges being alive and long enough.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

__all__ = ["available_bytes", "copy_bytes"]

_HELD = 64 << 10
"""Bytes. Letting other threads run during a shorter copy costs more than the copy: they contend for the interpreter."""

_memmove_held = ctypes.PYFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copy `nbytes` from address `source` to address `target`. Other threads run meanwhile when it takes long."""
    (_memmove_held if nbytes < _HELD else ctypes.memmove)(target, source, nbytes)


def available_bytes() -> int:
    """Host memory that can be had without swapping; all there is where the system does not tell."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
