"""The typed JSON of values without parts, for every encoder of objects. Imports neither torch nor numpy."""

from __future__ import annotations

import base64
import datetime
import math
import pathlib
from collections.abc import Callable
from typing import Any

__all__ = ["LEAVES", "ordered_items", "text64"]


def ordered_items(value: Any) -> list[Any]:
    """Items in a stable order: sets iterate differently in every process."""
    if isinstance(value, (slice, range)):
        return [value.start, value.stop, value.step]
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=lambda v: (type(v).__name__, repr(v)))
    return list(value)


def text64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def _itself(value: Any) -> Any:
    return value


LEAVES: dict[type, Callable[[Any], Any]] = {
    type(None): _itself,
    bool: _itself,
    str: _itself,
    int: lambda v: v if -(1 << 63) <= v < 1 << 64 else {"$int": hex(v)},
    float: lambda v: v if math.isfinite(v) else {"$float": repr(v)},
    bytes: lambda v: {"$bytes": text64(v)},
    bytearray: lambda v: {"$bytearray": text64(v)},
    complex: lambda v: {"$complex": [repr(v.real), repr(v.imag)]},
    datetime.date: lambda v: {"$date": v.isoformat()},
    datetime.timedelta: lambda v: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    pathlib.PosixPath: lambda v: {"$path": str(v)},
    pathlib.WindowsPath: lambda v: {"$path": str(v)},
}
"""Type -> what encodes a value of it. The format is that of `objects`."""
