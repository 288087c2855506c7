"""Python state <-> typed JSON and tensors. Opening it runs no code.

JSON's own values stand for themselves: None, bool, int, finite float, str, list, and dict with string keys. Everything
else is an object with one `$` key that names its type:

    $tuple $set $frozenset   [items]                 $dict $odict       [[key, value], ...]
    $defaultdict             [factory, [[k, v]...]]  $float $complex    "nan", "inf", "(1+2j)"
    $int                     "0x..." beyond 64 bits  $bytes $bytearray  base64
    $tensor $parameter       entry name              $dtensor           name of a tensor that all ranks hold in part
    $array                   entry name              $scalar            [numpy dtype, base64]
    $dtype $device           name                    $size $slice $range [numbers]
    $path $datetime $date $timedelta  text           $pickle            [entry name, type]: anything else

A pickled value is opened only when the caller says `weights_only=False`; the error names its path and type. Entries are
named tensors that lie beside the JSON in the same shard file.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import pathlib
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from zero_ckpt.errors import ConfigurationError, CorruptShardError, UnsafeObjectError

if TYPE_CHECKING:
    import torch

__all__ = [
    "OBJECTS",
    "RANK_OBJECTS",
    "EncodedObjects",
    "Shown",
    "decode_objects",
    "encode_objects",
    "show_objects",
]

OBJECTS, RANK_OBJECTS = "objects", "rank_objects"
"""Names of the two trees in a state file; `<name>.json` is the entry that holds the tree itself."""

_FACTORIES: dict[str, type] = {
    t.__name__: t for t in (list, dict, set, int, float, str, bool, tuple)
}
_PLAIN_KINDS = frozenset("biufc")


class EncodedObjects:
    """JSON bytes; the plain tensors and arrays beside it; and the DTensors, which all ranks store together."""

    __slots__ = ("dtensors", "entries", "json")

    def __init__(self) -> None:
        self.json = b""
        self.entries: dict[str, torch.Tensor] = {}
        self.dtensors: dict[str, torch.Tensor] = {}


class Shown:
    """Stands for a value of which only a description is wanted."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def encode_objects(tree: Any, prefix: str) -> EncodedObjects:
    """Encode a tree; entries are named `<prefix>/<path>`. Raises `ConfigurationError` for what cannot be pickled."""
    encoder = _Encoder(prefix)
    encoder.out.json = json.dumps(encoder.encode(tree, ()), separators=(",", ":")).encode()
    return encoder.out


class _Encoder:
    def __init__(self, prefix: str) -> None:
        self.out = EncodedObjects()
        self._prefix = prefix
        self._names: dict[int, tuple[str, Any]] = {}
        self._taken: set[str] = set()
        self._open: set[int] = set()

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -(1 << 63) <= value < 1 << 64 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind in (list, tuple, set, frozenset, dict, OrderedDict, defaultdict):
            return self._container(value, path)
        encode = _LEAVES.get(kind)
        return encode(value) if encode else self._other(value, path)

    def _container(self, value: Any, path: tuple[str, ...]) -> Any:
        if id(value) in self._open or len(path) > 100:
            return self._pickle(value, path)  # a cycle: pickle keeps it
        self._open.add(id(value))
        try:
            if isinstance(value, dict):
                return self._mapping(value, path)
            items = [self.encode(v, (*path, str(i))) for i, v in enumerate(_ordered(value))]
            return items if type(value) is list else {f"${type(value).__name__}": items}
        finally:
            self._open.discard(id(value))

    def _mapping(self, value: dict[Any, Any], path: tuple[str, ...]) -> Any:
        plain = all(type(k) is str and not k.startswith("$") for k in value)
        if type(value) is dict and plain:
            return {k: self.encode(v, (*path, k)) for k, v in value.items()}
        if isinstance(value, defaultdict):
            factory = value.default_factory
            name = None if factory is None else getattr(factory, "__name__", "")
            if name is not None and _FACTORIES.get(name) is not factory:
                return self._pickle(value, path)
            return {"$defaultdict": [name, self._pairs(value, path)]}
        name = "$odict" if isinstance(value, OrderedDict) else "$dict"
        return {name: self._pairs(value, path)}

    def _pairs(self, value: dict[Any, Any], path: tuple[str, ...]) -> list[Any]:
        return [
            [self.encode(k, (*path, "key")), self.encode(v, (*path, str(k)))]
            for k, v in value.items()
        ]

    def _other(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind in _PLAIN_KINDS:
            return self._array(value, path)
        if isinstance(value, np.generic) and value.dtype.kind in _PLAIN_KINDS:
            data = base64.b64encode(value.tobytes()).decode()
            return {"$scalar": [value.dtype.str, data]}
        return self._torch(value, path)

    def _array(self, value: np.ndarray[Any, Any], path: tuple[str, ...]) -> Any:
        import torch

        if value.dtype.str[1:] not in _TORCH_ARRAYS or not value.dtype.isnative:
            data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
            return {"$ndarray": [value.dtype.str, list(value.shape), data]}
        tensor = torch.from_numpy(np.array(value, order="C"))
        return {"$array": self._entry(tensor, value, path)}

    def _torch(self, value: Any, path: tuple[str, ...]) -> Any:
        import torch
        from torch.distributed.tensor import DTensor

        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        if isinstance(value, torch.Size):
            return {"$size": list(value)}
        if isinstance(value, DTensor):
            name = self._name(value, path)
            self.out.dtensors[name] = value
            return {"$dtensor": name}
        if type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and _is_plain(value):
            kind = "$parameter" if isinstance(value, torch.nn.Parameter) else "$tensor"
            return {kind: self._entry(value, value, path)}
        return self._pickle(value, path)

    def _pickle(self, value: Any, path: tuple[str, ...]) -> Any:
        import torch

        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        try:
            blob = pickle.dumps(value, protocol=4)
        except Exception as error:
            raise ConfigurationError(
                f"{'/'.join((self._prefix, *path))}: a {kind} is neither a supported type nor picklable ({error}). "
                "Store plain Python values, tensors or arrays instead."
            ) from error
        tensor = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        return {"$pickle": [self._entry(tensor, value, path), kind]}

    def _entry(self, tensor: torch.Tensor, owner: Any, path: tuple[str, ...]) -> str:
        name = self._name(owner, path)
        self.out.entries[name] = tensor.detach()
        return name

    def _name(self, owner: Any, path: tuple[str, ...]) -> str:
        """One name for one object, however often it appears. Holds the object, so that its id stays its own."""
        if id(owner) in self._names:
            return self._names[id(owner)][0]
        name = base = "/".join((self._prefix, *path))
        number = 2
        while name in self._taken:
            name, number = f"{base}~{number}", number + 1
        self._taken.add(name)
        self._names[id(owner)] = name, owner
        return name


_TORCH_ARRAYS = frozenset(
    ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16"]
)


def _is_plain(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def _ordered(value: Any) -> list[Any]:
    """Items in a stable order: sets iterate differently in every process."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=lambda v: (type(v).__name__, repr(v)))
    return list(value)


def _text64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


_LEAVES: dict[type, Callable[[Any], Any]] = {
    bytes: lambda v: {"$bytes": _text64(v)},
    bytearray: lambda v: {"$bytearray": _text64(v)},
    complex: lambda v: {"$complex": [repr(v.real), repr(v.imag)]},
    slice: lambda v: {"$slice": [v.start, v.stop, v.step]},
    range: lambda v: {"$range": [v.start, v.stop, v.step]},
    datetime.datetime: lambda v: {"$datetime": v.isoformat()},
    datetime.date: lambda v: {"$date": v.isoformat()},
    datetime.timedelta: lambda v: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    pathlib.PosixPath: lambda v: {"$path": str(v)},
    pathlib.WindowsPath: lambda v: {"$path": str(v)},
}


def decode_objects(
    data: bytes,
    entry: Callable[[str], Any],
    *,
    dtensor: Callable[[str], Any],
    weights_only: bool = True,
    where: str = "objects",
) -> Any:
    """The tree that `data` encodes.

    `entry(name)` gives the numpy array or torch tensor stored beside it, `dtensor(name)` what stands for a tensor held
    in parts. `weights_only` True refuses pickled values with `UnsafeObjectError`, False opens them. Raises
    `CorruptShardError` for what is no such tree.
    """
    return _decode(_Decoder(entry, dtensor, weights_only, where), data, where)


def show_objects(data: bytes, entry: Callable[[str], str], where: str = "objects") -> Any:
    """The tree that `data` encodes, for people: needs no torch, reads no entry, runs no code.

    Whatever is not plain Python or numpy is a `Shown`; `entry(name)` describes a stored tensor. Raises
    `CorruptShardError` for what is no such tree.
    """

    def describe(name: str) -> Shown:
        return Shown(entry(name))

    return _decode(_Viewer(describe, describe, True, where), data, where)


def _decode(decoder: _Decoder, data: bytes, where: str) -> Any:
    try:
        return decoder.decode(json.loads(data), ())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        if isinstance(error, (CorruptShardError, UnsafeObjectError)):
            raise
        raise CorruptShardError(f"{where}: not a tree of encoded objects: {error!r}") from error


class _Decoder:
    def __init__(
        self,
        entry: Callable[[str], Any],
        dtensor: Callable[[str], Any],
        weights_only: bool,
        where: str,
    ) -> None:
        self._entry, self._dtensor = entry, dtensor
        self._weights_only, self._where = weights_only, where
        self._shared: dict[str, Any] = {}

    def decode(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [self.decode(v, (*path, str(i))) for i, v in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if len(value) == 1 and next(iter(value)).startswith("$"):
            ((kind, content),) = value.items()
            return self._typed(kind, content, path)
        return {k: self.decode(v, (*path, k)) for k, v in value.items()}

    def _typed(self, kind: str, content: Any, path: tuple[str, ...]) -> Any:
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self.decode(content, path))
        if kind == "$defaultdict":
            name, pairs = content
            factory = None if name is None else _FACTORIES[name]
            return defaultdict(factory, self.decode(pairs, path))
        if kind in _DECODED:
            return _DECODED[kind](content)
        if kind == "$dtensor":
            return self._dtensor(content)
        name = content[0] if kind == "$pickle" else content
        if name not in self._shared:
            self._shared[name] = self._stored(kind, content, path)
        return self._shared[name]

    def _stored(self, kind: str, content: Any, path: tuple[str, ...]) -> Any:
        if kind == "$tensor":
            return self._entry(content)
        if kind == "$array":
            return np.asarray(self._entry(content))
        if kind == "$parameter":
            return _parameter(self._entry(content))
        if kind == "$pickle":
            return self._unpickle(content[0], content[1], path)
        raise ValueError(f"unknown type {kind!r} at {'/'.join(path)}")

    def _unpickle(self, name: str, type_name: str, path: tuple[str, ...]) -> Any:
        if self._weights_only:
            raise UnsafeObjectError(
                f"{self._where}: '{'/'.join(path)}' is a pickled {type_name}; opening it can run code. If you trust "
                "this checkpoint, load it with weights_only=False; or store plain values, tensors and arrays there."
            )
        return pickle.loads(np.asarray(self._entry(name)).tobytes())


class _Viewer(_Decoder):
    def _typed(self, kind: str, content: Any, path: tuple[str, ...]) -> Any:
        if kind in ("$dtype", "$device", "$size"):
            name = {"$dtype": "torch.", "$device": "device ", "$size": "torch.Size "}[kind]
            return Shown(f"{name}{content}")
        return super()._typed(kind, content, path)

    def _stored(self, kind: str, content: Any, path: tuple[str, ...]) -> Any:
        if kind == "$pickle":
            return Shown(f"<pickled {content[1]}>")
        if kind in ("$tensor", "$array", "$parameter"):
            return self._entry(content)
        return super()._stored(kind, content, path)


def _parameter(value: Any) -> Any:
    import torch

    trainable = value.is_floating_point() or value.is_complex()
    return torch.nn.Parameter(value, requires_grad=trainable)


def _torch_name(attribute: str) -> Callable[[Any], Any]:
    def decode(content: Any) -> Any:
        import torch

        if attribute == "dtype":
            found = getattr(torch, content)
            if not isinstance(found, torch.dtype):
                raise ValueError(f"{content!r} is no dtype")
            return found
        return torch.device(content) if attribute == "device" else torch.Size(content)

    return decode


def _scalar(content: Any) -> Any:
    return np.frombuffer(base64.b64decode(content[1]), dtype=_dtype(content[0]))[0]


def _ndarray(content: Any) -> Any:
    dtype, shape, data = content
    return np.frombuffer(base64.b64decode(data), dtype=_dtype(dtype)).reshape(shape).copy()


def _dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.kind not in _PLAIN_KINDS:
        raise ValueError(f"numpy dtype {text!r} is not a number")
    return dtype


_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$dict": dict,
    "$odict": OrderedDict,
}

_DECODED: dict[str, Callable[[Any], Any]] = {
    "$int": lambda v: int(v, 16),
    "$float": lambda v: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[v],
    "$complex": lambda v: complex(float(v[0]), float(v[1])),
    "$bytes": base64.b64decode,
    "$bytearray": lambda v: bytearray(base64.b64decode(v)),
    "$slice": lambda v: slice(*v),
    "$range": lambda v: range(*v),
    "$datetime": datetime.datetime.fromisoformat,
    "$date": datetime.date.fromisoformat,
    "$timedelta": lambda v: datetime.timedelta(*v),
    "$path": pathlib.Path,
    "$scalar": _scalar,
    "$ndarray": _ndarray,
    "$dtype": _torch_name("dtype"),
    "$device": _torch_name("device"),
    "$size": _torch_name("size"),
}
