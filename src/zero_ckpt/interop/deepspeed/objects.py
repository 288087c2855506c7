"""What a model file holds beside tensors, as the typed JSON of `core.objects`: inert data in, inert data out.

Tensors become entries that are read from where they are. An object of a class that is not opened becomes a `$pickle`,
which a load refuses, naming the class, unless the caller allows pickles.
"""

from __future__ import annotations

import datetime
import pathlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

from zero_ckpt.core.leaves import LEAVES, ordered_items, text64
from zero_ckpt.interop.deepspeed.pickle_writer import pickle_record
from zero_ckpt.interop.deepspeed.plain import TORCH_NAMES, Array, Device, NumpyDtype, Size
from zero_ckpt.interop.deepspeed.records import Global, Record
from zero_ckpt.interop.deepspeed.tensors import LayoutError, StoredTensor

__all__ = ["ObjectEncoder"]

MAX_NODES = 5_000_000
"""Values that a tree may have. A small pickle can refer to one list over and over, and so stand for a huge tree."""

_NUMBERS = frozenset("biufc")
"""numpy's kinds of numbers: their bytes are their values."""

Path = tuple[str, ...]


class ObjectEncoder:
    """Encodes one tree. `prefix`: of entries' names. `tensors`, `pickles`: entry name -> what it holds."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._nodes = 0
        self._names: dict[int, str] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.pickles: dict[str, bytes] = {}

    def encode(self, value: Any, path: Path = ()) -> Any:
        """Raises `LayoutError` for a tree that is too large or nested too deeply."""
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > 200:
            raise LayoutError(f"'{'/'.join(path[:4])}' is too large or too deep for objects")
        kind = type(value)
        leaf = _LEAVES.get(kind)
        if leaf is not None:
            return leaf(value)
        if kind in _SEQUENCES:
            items = [
                self.encode(item, (*path, str(i))) for i, item in enumerate(ordered_items(value))
            ]
            return items if kind is list else {_SEQUENCES[kind]: items}
        if isinstance(value, dict):
            return self._mapping(value, path)
        return self._other(value, path)

    def _mapping(self, value: dict[Any, Any], path: Path) -> Any:
        plain = all(type(k) is str and not k.startswith("$") for k in value)
        if type(value) is dict and plain:
            return {k: self.encode(v, (*path, k)) for k, v in value.items()}
        pairs = [
            [self.encode(k, (*path, "key")), self.encode(v, (*path, str(k)))]
            for k, v in value.items()
        ]
        if isinstance(value, defaultdict):
            factory = value.default_factory
            return {"$defaultdict": [None if factory is None else factory.__name__, pairs]}
        kind = {OrderedDict: "$odict", Counter: "$counter"}.get(type(value), "$dict")
        return {kind: pairs}

    def _other(self, value: Any, path: Path) -> Any:
        if isinstance(value, StoredTensor):
            return {"$tensor": self._tensor(value, path)}
        if isinstance(value, Array):
            return self._array(value, path)
        if isinstance(value, Global) and value.module == "torch" and value.name in TORCH_NAMES:
            return {"$dtype": value.name}
        return self._pickle(value, path)

    def _tensor(self, value: StoredTensor, path: Path) -> str:
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = self._entry(path)
            self.tensors[name] = value
        return name

    def _array(self, value: Array, path: Path) -> Any:
        import numpy as np

        code = value.dtype.text if value.dtype is not None else ""
        if value.data is None or (
            code[-2:-1] not in _NUMBERS and code.lstrip("<>=|")[:1] not in _NUMBERS
        ):
            return self._pickle(value, path)
        try:
            dtype = np.dtype(code)
            if value.shape is None:
                np.frombuffer(value.data, dtype=dtype, count=1)
                return {"$scalar": [dtype.str, text64(value.data)]}
            order = "F" if value.fortran else "C"
            array = np.frombuffer(value.data, dtype=dtype).reshape(value.shape, order=order)  # type: ignore[call-overload]
        except (TypeError, ValueError) as error:
            raise LayoutError(f"'{'/'.join(path)}': a numpy array that is none: {error}") from error
        return {"$ndarray": [dtype.str, list(value.shape), text64(array.tobytes("C"))]}

    def _pickle(self, value: Any, path: Path) -> Any:
        kind = _kind(value)
        name = self._entry(path)
        self.pickles[name] = pickle_record(value)
        return {"$pickle": [name, kind]}

    def _entry(self, path: Path) -> str:
        base = "/".join((self._prefix, *path)).encode(errors="backslashreplace").decode()
        name, number = base, 2
        while name in self.tensors or name in self.pickles:
            name, number = f"{base}~{number}", number + 1
        return name


def _kind(value: Any) -> str:
    if isinstance(value, Record):
        return value.kind.path
    return value.path if isinstance(value, Global) else f"numpy.{type(value).__name__.lower()}"


_SEQUENCES: dict[type, str] = {
    list: "",
    tuple: "$tuple",
    set: "$set",
    frozenset: "$frozenset",
    slice: "$slice",
    range: "$range",
}


_LEAVES: dict[type, Callable[[Any], Any]] = {
    **LEAVES,
    datetime.datetime: lambda v: {"$datetime": v.isoformat()},
    pathlib.PurePosixPath: lambda v: {"$path": str(v)},
    pathlib.PureWindowsPath: lambda v: {"$path": str(v)},
    Size: lambda v: {"$size": list(v)},
    Device: lambda v: {"$device": v.name},
    NumpyDtype: lambda v: {"$pickle": ["", f"numpy.dtype[{v.code}]"]},
}
