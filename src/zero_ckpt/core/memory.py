"""Copies between raw addresses. Knows no tensors; the caller answers for both ranges being alive and long enough."""

from __future__ import annotations

import ctypes

__all__ = ["copy_bytes"]

_HELD = 64 << 10
"""Bytes. Letting other threads run during a shorter copy costs more than the copy: they contend for the interpreter."""

_memmove_held = ctypes.PYFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copy `nbytes` from address `source` to address `target`. Other threads run meanwhile when it takes long."""
    (_memmove_held if nbytes < _HELD else ctypes.memmove)(target, source, nbytes)
