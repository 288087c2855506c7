"""Inert records back into the pickle that they were, for a caller who allows pickles. Runs no code.

Opcodes: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from typing import Any

from zero_ckpt.interop.deepspeed.plain import Array
from zero_ckpt.interop.deepspeed.records import Global, Record

__all__ = ["pickle_record"]

MAX_DEPTH = 100


def pickle_record(value: Any) -> bytes:
    """A pickle of the value; empty bytes where it holds what only the file has (tensors)."""
    try:
        return b"\x80\x04" + b"".join(_write(value, 0)) + b"."
    except _Unwritable:
        return b""


class _Unwritable(Exception):
    """The value cannot be pickled by itself."""


def _write(value: Any, depth: int) -> list[bytes]:
    if depth > MAX_DEPTH:
        raise _Unwritable
    if isinstance(value, Global):
        return [*_plain(value.module), *_plain(value.name), b"\x93"]
    if isinstance(value, Record):
        return _record(value, depth)
    if isinstance(value, Array):
        return _write(_as_record(value), depth)
    if type(value) is dict:
        pairs = [part for item in value.items() for x in item for part in _write(x, depth + 1)]
        return [b"}(", *pairs, b"u"]
    if type(value) is list:
        return [b"](", *(part for x in value for part in _write(x, depth + 1)), b"e"]
    if type(value) is tuple:
        return [b"(", *(part for x in value for part in _write(x, depth + 1)), b"t"]
    return _plain(value)


def _record(value: Record, depth: int) -> list[bytes]:
    args = _write(value.args, depth + 1)
    parts = [*_write(value.kind, depth), *args, b"\x81" if value.new else b"R"]
    if value.items:
        parts += [b"(", *(p for x in value.items for p in _write(x, depth + 1)), b"e"]
    if value.pairs:
        flat = [x for pair in value.pairs for x in pair]
        parts += [b"(", *(p for x in flat for p in _write(x, depth + 1)), b"u"]
    if value.state is not None:
        parts += [*_write(value.state, depth + 1), b"b"]
    return parts


def _as_record(array: Array) -> Record:
    """A numpy array or scalar as numpy pickles it."""
    import numpy as np

    if array.dtype is None or array.data is None:
        raise _Unwritable
    state = (3, array.dtype.order, None, None, None, -1, -1, 0)
    dtype = Record(Global("numpy", "dtype"), (array.dtype.code, False, True), state=state)
    module = np.zeros(0).__reduce__()[0].__module__  # another one in each version of numpy
    if array.shape is None:
        return Record(Global(module, "scalar"), (dtype, array.data))
    made = Record(Global(module, "_reconstruct"), (Global("numpy", "ndarray"), (0,), b"b"))
    made.state = (1, array.shape, dtype, array.fortran, array.data)
    return made


def _plain(value: Any) -> list[bytes]:
    """Values of the standard library, by the standard library, without its frame and end."""
    if type(value).__module__.partition(".")[0] not in _STANDARD:
        raise _Unwritable
    if type(value) is str:
        data = value.encode("utf-8", "surrogatepass")
        return [b"X", struct.pack("<I", len(data)), data]
    data = pickletools.optimize(pickle.dumps(value, protocol=3))
    if any(code.name in ("BINGET", "LONG_BINGET") for code, _, _ in pickletools.genops(data)):
        raise _Unwritable  # it refers to itself, by numbers that mean something else here
    return [data[2:-1]]


_STANDARD = frozenset({"builtins", "datetime", "pathlib", "collections"})
