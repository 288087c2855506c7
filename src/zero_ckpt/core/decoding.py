"""Typed JSON and tensors -> Python state. The format is that of `objects`; believes nothing, runs no code."""

from __future__ import annotations

import base64
import datetime
import json
import math
import pathlib
import pickle
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from zero_ckpt.core.encoding import FACTORIES, PLAIN_KINDS
from zero_ckpt.errors import CorruptShardError, UnsafeObjectError, ZeroCkptError

__all__ = ["Shown", "decode_objects", "show_objects"]

Path = tuple[str, ...]


class Shown:
    """Stands for a value of which only a description is wanted."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def decode_objects(
    data: bytes,
    entry: Callable[[str], Any],
    *,
    dtensor: Callable[[str], Any],
    blob: Callable[[str], bytes] | None = None,
    weights_only: bool = True,
    where: str = "objects",
) -> Any:
    """The tree that `data` encodes.

    `entry(name)`: gives the numpy array or torch tensor that is stored beside the JSON under this name; it may be
    filled after this has returned. `dtensor(name)`: gives what stands for a tensor that ranks hold in parts.
    `blob(name)`: gives the bytes of a pickle, which are needed at once; None: `entry` gives them. `weights_only`: True
    refuses pickled values with `UnsafeObjectError`, False opens them. `where`: what to call the tree in errors.

    Raises `CorruptShardError` for data that is no such tree.
    """
    return _decode(_Decoder(entry, dtensor, blob, weights_only, where), data, where)


def show_objects(data: bytes, entry: Callable[[str], str], where: str = "objects") -> Any:
    """The tree that `data` encodes, for people: needs no torch, reads no entry, runs no code.

    Whatever is not plain Python or numpy is a `Shown`. `entry(name)`: describes a stored tensor. `where`: what to call
    the tree in errors. Raises `CorruptShardError` for data that is no such tree.
    """

    def describe(name: str) -> Shown:
        return Shown(entry(name))

    return _decode(_Viewer(describe, describe, None, True, where), data, where)


def _decode(decoder: _Decoder, data: bytes, where: str) -> Any:
    try:
        return decoder.decode(json.loads(data), ())
    except (ZeroCkptError, OSError, MemoryError):
        raise  # from the reader of the entries, whose errors say more, or not about the data
    except Exception as error:
        raise CorruptShardError(f"{where}: not a tree of encoded objects: {error!r}") from error


class _Decoder:
    def __init__(
        self,
        entry: Callable[[str], Any],
        dtensor: Callable[[str], Any],
        blob: Callable[[str], bytes] | None,
        weights_only: bool,
        where: str,
    ) -> None:
        self._entry, self._dtensor, self._blob = entry, dtensor, blob or self._bytes
        self._weights_only, self._where = weights_only, where
        self._shared: dict[str, Any] = {}

    def _bytes(self, name: str) -> bytes:
        stored = self._entry(name)
        return np.asarray(stored.cpu() if hasattr(stored, "cpu") else stored).tobytes()

    def decode(self, value: Any, path: Path) -> Any:
        if isinstance(value, list):
            return [self.decode(v, (*path, str(i))) for i, v in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if len(value) == 1 and next(iter(value)).startswith("$"):
            ((kind, content),) = value.items()
            return self._typed(kind, content, path)
        return {k: self.decode(v, (*path, k)) for k, v in value.items()}

    def _typed(self, kind: str, content: Any, path: Path) -> Any:
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self.decode(content, path))
        if kind == "$defaultdict":
            name, pairs = content
            factory = None if name is None else FACTORIES[name]
            return defaultdict(factory, self.decode(pairs, path))
        if kind in _DECODED:
            return _DECODED[kind](content)
        if kind == "$dtensor":
            return self._dtensor(content)
        name = content[0] if kind in ("$pickle", "$parameter") else content
        if name not in self._shared:
            self._shared[name] = self._stored(kind, content, path)
        return self._shared[name]

    def _stored(self, kind: str, content: Any, path: Path) -> Any:
        if kind == "$tensor":
            return self._entry(content)
        if kind == "$array":
            return np.asarray(self._entry(content))
        if kind == "$parameter":
            return _parameter(self._entry(content[0]), content[1])
        if kind == "$pickle":
            return self._unpickle(content[0], content[1], "/".join(path))
        raise ValueError(f"unknown type {kind!r} at {'/'.join(path)}")

    def _unpickle(self, name: str, type_name: str, path: str) -> Any:
        what = f"{self._where}: '{path}'" if path else self._where
        if self._weights_only:
            raise UnsafeObjectError(
                f"{what} is a pickled {type_name}; opening it can run code. If you trust "
                "this checkpoint, load it with weights_only=False; or store plain values, tensors and arrays there."
            )
        data = self._blob(name)
        try:
            return pickle.loads(data)
        except Exception as error:
            raise UnsafeObjectError(
                f"{what} is a pickled {type_name}, which could not be opened: {error!r}. Make its "
                "class importable, as it was when the checkpoint was saved."
            ) from error


_SHOWN_AS = {"$dtype": "torch.{}", "$device": "device('{}')", "$size": "torch.Size({})"}


class _Viewer(_Decoder):
    def _typed(self, kind: str, content: Any, path: Path) -> Any:
        form = _SHOWN_AS.get(kind)
        return (
            Shown(form.format(content)) if form is not None else super()._typed(kind, content, path)
        )

    def _stored(self, kind: str, content: Any, path: Path) -> Any:
        if kind == "$pickle":
            return Shown(f"<pickled {content[1]}>")
        if kind in ("$tensor", "$array", "$parameter"):
            return self._entry(content[0] if kind == "$parameter" else content)
        return super()._stored(kind, content, path)


def _parameter(value: Any, requires_grad: bool) -> Any:
    import torch

    return torch.nn.Parameter(value, requires_grad=requires_grad)


def _torch_dtype(name: str) -> Any:
    import torch

    found = vars(torch).get(name)  # getattr would import torch's lazy modules
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _torch_device(name: str) -> Any:
    import torch

    return torch.device(_text(name))


def _torch_size(numbers: Any) -> Any:
    import torch

    return torch.Size(numbers)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _scalar(content: Any) -> Any:
    return np.frombuffer(base64.b64decode(content[1]), dtype=_dtype(content[0]))[0]


def _ndarray(content: Any) -> Any:
    dtype, shape, data = content
    return np.frombuffer(base64.b64decode(data), dtype=_dtype(dtype)).reshape(shape).copy()


def _dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(_text(name))
    if dtype.kind not in PLAIN_KINDS:
        raise ValueError(f"numpy dtype {name!r} is not a number")
    return dtype


_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$dict": dict,
    "$odict": OrderedDict,
    "$counter": lambda pairs: Counter(dict(pairs)),
    "$slice": lambda v: slice(*v),
    "$range": lambda v: range(*v),
}

_DECODED: dict[str, Callable[[Any], Any]] = {
    "$int": lambda v: int(v, 16),
    "$float": lambda v: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[v],
    "$complex": lambda v: complex(float(v[0]), float(v[1])),
    "$bytes": base64.b64decode,
    "$bytearray": lambda v: bytearray(base64.b64decode(v)),
    "$datetime": datetime.datetime.fromisoformat,
    "$date": datetime.date.fromisoformat,
    "$timedelta": lambda v: datetime.timedelta(*v),
    "$path": pathlib.Path,
    "$scalar": _scalar,
    "$ndarray": _ndarray,
    "$dtype": _torch_dtype,
    "$device": _torch_device,
    "$size": _torch_size,
}
