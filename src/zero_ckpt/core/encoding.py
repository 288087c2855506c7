"""Python state -> typed JSON and tensors. The format is that of `objects`; copies no tensor."""

from __future__ import annotations

import datetime
import json
import pickle
from collections import Counter, OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from zero_ckpt.core.leaves import LEAVES, ordered_items, text64
from zero_ckpt.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["FACTORIES", "PLAIN_KINDS", "EncodedObjects", "encode_objects"]

FACTORIES: dict[str, type] = {
    t.__name__: t for t in (list, dict, set, int, float, str, bool, tuple)
}
"""What a stored `defaultdict` may call."""

PLAIN_KINDS = frozenset("biufc")
"""numpy's kinds of numbers and booleans: their bytes are their values."""

_MAX_DEPTH = 100
_CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict, defaultdict, Counter, slice, range)
_TORCH_ARRAYS = frozenset(
    ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16"]
)

Path = tuple[str, ...]


class EncodedObjects:
    """JSON bytes; the plain tensors and arrays beside it; and the DTensors, which all ranks store together.

    `pickled`: path -> type of what is neither and became a pickle.
    """

    __slots__ = ("dtensors", "entries", "json", "pickled")

    def __init__(self) -> None:
        self.json = b""
        self.entries: dict[str, torch.Tensor] = {}
        self.dtensors: dict[str, torch.Tensor] = {}
        self.pickled: dict[str, str] = {}


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

    def encode(self, value: Any, path: Path) -> Any:
        kind = type(value)
        leaf = LEAVES.get(kind)
        if leaf is not None:
            return leaf(value)
        if kind in _CONTAINERS:
            return self._container(value, path)
        if kind is datetime.datetime and _is_plain_time(value):
            return {"$datetime": value.isoformat()}
        return self._other(value, path)

    def _container(self, value: Any, path: Path) -> Any:
        if id(value) in self._open or len(path) > _MAX_DEPTH:
            return self._pickle(value, path)  # a cycle: pickle keeps it
        self._open.add(id(value))
        try:
            if isinstance(value, dict):
                return self._mapping(value, path)
            items = [self.encode(v, (*path, str(i))) for i, v in enumerate(ordered_items(value))]
            return items if type(value) is list else {f"${type(value).__name__}": items}
        finally:
            self._open.discard(id(value))

    def _mapping(self, value: dict[Any, Any], path: Path) -> Any:
        plain = all(type(k) is str and not k.startswith("$") for k in value)
        if type(value) is dict and plain:
            return {k: self.encode(v, (*path, k)) for k, v in value.items()}
        if isinstance(value, defaultdict):
            factory = value.default_factory
            name = None if factory is None else getattr(factory, "__name__", "")
            if name is not None and FACTORIES.get(name) is not factory:
                return self._pickle(value, path)
            return {"$defaultdict": [name, self._pairs(value, path)]}
        kind = {OrderedDict: "$odict", Counter: "$counter"}.get(type(value), "$dict")
        return {kind: self._pairs(value, path)}

    def _pairs(self, value: dict[Any, Any], path: Path) -> list[Any]:
        return [
            [self.encode(k, (*path, "key")), self.encode(v, (*path, str(k)))]
            for k, v in value.items()
        ]

    def _other(self, value: Any, path: Path) -> Any:
        if type(value) is np.ndarray and value.dtype.kind in PLAIN_KINDS:
            return self._array(value, path)
        if isinstance(value, np.generic) and value.dtype.kind in PLAIN_KINDS:
            return {"$scalar": [value.dtype.str, text64(value.tobytes())]}
        return self._torch(value, path)

    def _array(self, value: np.ndarray[Any, Any], path: Path) -> Any:
        import torch

        if value.dtype.str[1:] not in _TORCH_ARRAYS or not value.dtype.isnative:
            data = text64(np.ascontiguousarray(value).tobytes())
            return {"$ndarray": [value.dtype.str, list(value.shape), data]}
        tensor = torch.from_numpy(np.array(value, order="C"))
        return {"$array": self._entry(tensor, value, path)}

    def _torch(self, value: Any, path: Path) -> Any:
        import torch
        from torch.distributed.tensor import DTensor

        from zero_ckpt.core.lazy import LazyTensor

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
        if isinstance(value, LazyTensor):
            return {"$tensor": self._entry(value.materialize(), value, path)}
        if type(value) in (torch.Tensor, torch.nn.Parameter) and _is_dense(value):
            name = self._entry(value, value, path)
            if isinstance(value, torch.nn.Parameter):
                return {"$parameter": [name, value.requires_grad]}
            return {"$tensor": name}
        return self._pickle(value, path)

    def _pickle(self, value: Any, path: Path) -> Any:
        import torch

        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        try:
            blob = pickle.dumps(value, protocol=4)
        except Exception as error:
            raise ConfigurationError(
                f"{'/'.join((self._prefix, *path))}: {kind} is neither a supported type nor picklable ({error}). "
                "Store plain Python values, tensors or arrays instead."
            ) from error
        tensor = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        self.out.pickled["/".join(path)] = kind
        return {"$pickle": [self._entry(tensor, value, path), kind]}

    def _entry(self, tensor: torch.Tensor, owner: Any, path: Path) -> str:
        name = self._name(owner, path)
        self.out.entries[name] = tensor.detach()
        return name

    def _name(self, owner: Any, path: Path) -> str:
        """The name of an object's entry, the same wherever it appears. Keeps it alive, so that its id stays its own."""
        if id(owner) in self._names:
            return self._names[id(owner)][0]
        # Lone surrogates have no place in UTF-8, which names of safetensors entries are.
        name = base = "/".join((self._prefix, *path)).encode(errors="backslashreplace").decode()
        number = 2
        while name in self._taken:
            name, number = f"{base}~{number}", number + 1
        self._taken.add(name)
        self._names[id(owner)] = name, owner
        return name


def _is_dense(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def _is_plain_time(value: datetime.datetime) -> bool:
    """Whether ISO text says all: no named time zone, and not the second of two equal clock readings."""
    return not value.fold and (value.tzinfo is None or type(value.tzinfo) is datetime.timezone)
