"""Stand-ins for stored tensors: shape and dtype at once, bytes read and verified when they are used.

A `LazyTensor` is a `torch.Tensor` for whoever only asks what it is. Any operation on it (`.contiguous()`, indexing,
arithmetic, `copy_` from it) first reads the stored values; indexing with integers and slices reads only the bytes
that the result needs. One that meets a DTensor of its shape becomes a DTensor that is sharded alike, of which each rank
reads its own part. Pickling or deep-copying one gives the values.

Values stay in memory only where somebody could tell: when an operation changed them, or its result shares their
memory. So a model that is loaded from a dict of lazy tensors takes the memory of one tensor beside its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.dtensors import layout_of, local_part

__all__ = ["LazyTensor"]

_Read = Callable[[Box], torch.Tensor]

_METADATA = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.ndimension,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.element_size,
        torch.Tensor.stride,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.__len__,
        torch.Tensor.__hash__,
        *(
            getattr(torch.Tensor, name).__get__
            for name in [
                "shape",
                "dtype",
                "device",
                "layout",
                "ndim",
                "requires_grad",
                "is_leaf",
                "grad_fn",
                "nbytes",
                "itemsize",
                "grad",
                "is_meta",
                "is_sparse",
                "is_quantized",
                "is_cuda",
                "is_cpu",
                "is_nested",
            ]
        ),
    }
)


class LazyTensor(torch.Tensor):
    """Shape and dtype of a stored tensor, on the CPU. `role` and `key` say where it is stored in
    `source`, the checkpoint that made it.
    """

    source: object = None
    fill: Callable[[Box, torch.Tensor], None] | None = None
    role: str
    key: str
    _read: _Read
    _value: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, role: str, key: str, shape: tuple[int, ...], dtype: torch.dtype, read: _Read
    ) -> LazyTensor:
        self: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        self.role, self.key, self._read, self._value = role, key, read, None
        return self

    @property
    def is_read(self) -> bool:
        """Whether the values are here already; a caller may have changed them since."""
        return self._value is not None

    def materialize(self) -> torch.Tensor:
        """The values, as a plain tensor, which stay here. Raises `CorruptShardError` for damaged bytes."""
        if self._value is None:
            self._value = self._read(full_box(tuple(self.shape)))
        return self._value

    def read_box(self, box: Box) -> torch.Tensor:
        """The values of `box` only."""
        return self._value[box.slices()] if self._value is not None else self._read(box)

    def read_into(self, box: Box, target: torch.Tensor) -> None:
        """Fill `target` with the values of `box`, without memory of its own where the source can do that."""
        if self.fill is not None and self._value is None:
            self.fill(box, target)
        else:
            target.copy_(self.read_box(box))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({self.key!r}, shape={list(self.shape)}, dtype={self.dtype})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        box = _box_of(index, tuple(self.shape))
        if box is None:
            return self.materialize()[index]
        squeezed = tuple(0 if isinstance(item, int) else slice(None) for item in _as_tuple(index))
        return self.read_box(box)[squeezed]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialize().clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        like = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, DTensor)), None)
        use = _Use(like)
        args, kwargs = tree_map(use.value_of, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if (
            func is not torch.Tensor.contiguous
        ):  # a tensor of its own, as DeepSpeed's stand-ins give
            use.keep(result)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_value_of, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Use:
    """The values that one operation reads. `like`: a DTensor that it reads, too."""

    def __init__(self, like: DTensor | None) -> None:
        self._like = like
        self._read: dict[int, tuple[LazyTensor, torch.Tensor, int | None]] = {}

    def value_of(self, given: Any) -> Any:
        if not isinstance(given, LazyTensor):
            return given
        if self._like is not None and self._like.shape == given.shape:
            return _part(given, self._like)
        if given._value is not None:
            return given._value
        if id(given) not in self._read:
            value = given._read(full_box(tuple(given.shape)))
            self._read[id(given)] = given, value, _version(value)
        return self._read[id(given)][1]

    def keep(self, result: Any) -> None:
        """Those that the operation changed, or whose memory `result` has, as far as that can be told."""
        leaves = tree_leaves(result)
        unknown = not all(isinstance(leaf, _PLAIN) or _has_own_memory(leaf) for leaf in leaves)
        shared = {
            _memory(leaf) for leaf in leaves if not unknown and isinstance(leaf, torch.Tensor)
        }
        for lazy, value, version in self._read.values():
            changed = version is None or _version(value) != version
            if unknown or changed or _memory(value) in shared:
                lazy._value = value


_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def _has_own_memory(leaf: Any) -> bool:
    return type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout is torch.strided


def _version(tensor: torch.Tensor) -> int | None:
    """A number that every change in place raises; None where torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _value_of(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyTensor) else value


def _part(value: LazyTensor, like: DTensor) -> DTensor:
    """The values as a DTensor that lies on the ranks as `like` does."""
    part: DTensor = torch.empty_like(like, dtype=value.dtype)  # type: ignore[assignment]
    key = value.key
    local, box = local_part(key, part, layout_of(key, part), dist.get_rank())
    if box is not None and box.numel:
        value.read_into(box, local)
    return part


def _as_tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _box_of(index: Any, shape: tuple[int, ...]) -> Box | None:
    """The box that plain integers and unit-step slices select; None for any other index."""
    items = _as_tuple(index)
    if len(items) > len(shape):
        return None
    offset, extent = [], []
    for item, size in zip(items, shape, strict=False):
        if isinstance(item, slice) and item.step in (None, 1):
            start, stop, _ = item.indices(size)
            offset.append(start)
            extent.append(max(0, stop - start))
        elif type(item) is int and -size <= item < size:
            offset.append(item % size)
            extent.append(1)
        else:
            return None
    rest = shape[len(items) :]
    box = Box((*offset, *(0 for _ in rest)), (*extent, *rest))
    return box if box.numel else None
