"""Inert records back into the pickle that they were, for a caller who allows pickles. Runs no code.

Opcodes: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from zero_ckpt.interop.deepspeed.plain import Array
from zero_ckpt.interop.deepspeed.records import Global, Record

__all__ = ["pickle_record"]

MAX_DEPTH = 100


def pickle_record(value: Any) -> bytes:
    """A pickle of the value; empty bytes where it holds what only the file has (tensors)."""
    try:
        return pickle.PROTO + b"\x04" + b"".join(_write(value, 0)) + pickle.STOP
    except _Unwritable:
        return b""


class _Unwritable(Exception):
    """The value cannot be pickled by itself."""


def _write(value: Any, depth: int) -> list[bytes]:
    if depth > MAX_DEPTH:
        raise _Unwritable
    if isinstance(value, Global):
        return [*_plain(value.module), *_plain(value.name), pickle.STACK_GLOBAL]
    if isinstance(value, Record):
        return _record(value, depth)
    if isinstance(value, Array):
        return _write(_as_record(value), depth)
    if type(value) is dict:
        flat = chain.from_iterable(value.items())
        return [pickle.EMPTY_DICT, pickle.MARK, *_write_all(flat, depth), pickle.SETITEMS]
    if type(value) is list:
        return [pickle.EMPTY_LIST, pickle.MARK, *_write_all(value, depth), pickle.APPENDS]
    if type(value) is tuple:
        return [pickle.MARK, *_write_all(value, depth), pickle.TUPLE]
    return _plain(value)


def _write_all(values: Iterable[Any], depth: int) -> Iterator[bytes]:
    """The values that lie in one of `depth`, one after the other."""
    for value in values:
        yield from _write(value, depth + 1)


def _record(value: Record, depth: int) -> list[bytes]:
    args = _write(value.args, depth + 1)
    parts = [*_write(value.kind, depth), *args, pickle.NEWOBJ if value.new else pickle.REDUCE]
    if value.items:
        parts += [pickle.MARK, *_write_all(value.items, depth), pickle.APPENDS]
    if value.pairs:
        flat = chain.from_iterable(value.pairs)
        parts += [pickle.MARK, *_write_all(flat, depth), pickle.SETITEMS]
    if value.state is not None:
        parts += [*_write(value.state, depth + 1), pickle.BUILD]
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
        return [pickle.BINUNICODE, struct.pack("<I", len(data)), data]
    data = pickletools.optimize(pickle.dumps(value, protocol=3))
    if any(code.name in ("BINGET", "LONG_BINGET") for code, _, _ in pickletools.genops(data)):
        raise _Unwritable  # it refers to itself, by numbers that mean something else here
    return [data[2:-1]]


_STANDARD = frozenset({"builtins", "datetime", "pathlib", "collections"})
