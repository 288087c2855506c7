"""A file as `torch.save` writes it, byte for byte, before its tensors are read.

The archive holds `data.pkl`, a pickle in which tensors are rebuilt from numbered storages, and one record for each
storage. `torch.load(weights_only=True)` and `torch.load(mmap=True)` open it. Tied weights share one storage.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import _utils as rebuilding

from zero_ckpt.core.dtensors import DTYPE_NAMES, TORCH_DTYPES
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.planner import Placed
from zero_ckpt.fp32.archive import Archive
from zero_ckpt.fp32.layout import FileLayout, in_stored_order
from zero_ckpt.fp32.selection import OutTensor, stored_tensor

__all__ = ["layout_torch_file", "stand_ins"]

_STORAGES = {
    "F64": torch.DoubleStorage,
    "F32": torch.FloatStorage,
    "F16": torch.HalfStorage,
    "BF16": torch.BFloat16Storage,
    "I64": torch.LongStorage,
    "I32": torch.IntStorage,
    "I16": torch.ShortStorage,
    "I8": torch.CharStorage,
    "U8": torch.ByteStorage,
    "BOOL": torch.BoolStorage,
    "C64": torch.ComplexFloatStorage,
    "C128": torch.ComplexDoubleStorage,
}
"""Types that have a storage class of their own in the format; others are untyped storages with a dtype beside."""


@dataclass(frozen=True, slots=True, eq=False)
class _StandIn:
    """Pickled as the tensor that `source` is or will be."""

    source: OutTensor | torch.Tensor
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    number: int
    dtype: str
    numel: int


def stand_ins(tensors: Sequence[OutTensor]) -> dict[str, Any]:
    """A state dict under every name, whose values stand for stored tensors that `layout_torch_file` will place."""
    found: dict[str, Any] = {}
    for tensor in tensors:
        stand_in = _StandIn(tensor, tensor.dtype, tensor.shape)
        found |= dict.fromkeys(tensor.names, stand_in)
    return found


def layout_torch_file(tree: Any, placed: Callable[[str, str], Placed]) -> FileLayout:
    """The layout of a file from which `torch.load` makes `tree`.

    The tree may hold `stand_ins` and lazy tensors of the checkpoint, which are streamed when the file is written, and
    plain tensors, whose bytes become part of the layout. `placed(role, key)`: where a lazy tensor is stored.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, placed)
    pickler.dump(tree)
    archive = Archive("archive")
    archive.add_bytes("data.pkl", stream.getvalue())
    archive.add_bytes("byteorder", b"little")
    stored = {id(s): n for n, s in enumerate(pickler.sources) if isinstance(s, OutTensor)}
    for tensor in in_stored_order([s for s in pickler.sources if isinstance(s, OutTensor)]):
        archive.add_tensor(f"data/{stored[id(tensor)]}", tensor)
    for number, source in enumerate(pickler.sources):
        if isinstance(source, torch.Tensor):
            archive.add_bytes(f"data/{number}", _bytes(source))
    archive.add_bytes("version", b"3\n")
    return archive.finish()


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


class _Pickler(pickle.Pickler):
    """Writes tensors as the format does. `sources`: what fills storage 0, 1, ..."""

    def __init__(self, stream: io.BytesIO, placed: Callable[[str, str], Placed]) -> None:
        super().__init__(stream, protocol=2)
        self._placed = placed
        self.sources: list[OutTensor | torch.Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = _STORAGES.get(obj.dtype)
        if kind is None:
            size = TORCH_DTYPES[obj.dtype].itemsize
            return ("storage", torch.UntypedStorage, str(obj.number), "cpu", obj.numel * size)
        return ("storage", kind, str(obj.number), "cpu", obj.numel)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            return self._reduce(self._stand_in(obj))
        return self._reduce(obj) if isinstance(obj, _StandIn) else NotImplemented

    def _reduce(self, tensor: _StandIn) -> tuple[Any, tuple[Any, ...]]:
        storage = _Storage(len(self.sources), tensor.dtype, prod(tensor.shape))
        self.sources.append(tensor.source)
        strides = tuple(prod(tensor.shape[d + 1 :]) for d in range(len(tensor.shape)))
        hooks: dict[str, Any] = OrderedDict()
        args = (storage, 0, tensor.shape, strides, False, hooks)
        if tensor.dtype in _STORAGES:
            return rebuilding._rebuild_tensor_v2, args
        return rebuilding._rebuild_tensor_v3, (*args, TORCH_DTYPES[tensor.dtype])

    def _stand_in(self, tensor: torch.Tensor) -> _StandIn:
        source: OutTensor | torch.Tensor = tensor
        if isinstance(tensor, LazyTensor):
            source = stored_tensor(tensor.role, tensor.key, self._placed(tensor.role, tensor.key))
        return _StandIn(source, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
