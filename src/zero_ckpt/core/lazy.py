"""Stand-ins for stored tensors: shape and dtype at once, bytes read and verified when they are used.

A `LazyTensor` is a `torch.Tensor` for whoever only asks what it is. Any operation on it (`.contiguous()`, indexing,
arithmetic, `copy_` from it) first reads the stored values; indexing with integers and slices reads only the bytes
that the result needs. One that meets a DTensor of its shape becomes a DTensor that is sharded alike, of which each rank
reads its own part, and stays one if the operation changed it. Pickling or deep-copying one gives the values.

Values stay in memory only where somebody could tell: when an operation changed them, or its result shares their
memory. So a model that is loaded from a dict of lazy tensors takes the memory of one tensor beside its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
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
    """Shape and dtype of a stored tensor, on the CPU.

    `role` and `key` say where it is stored in `source`, the checkpoint that made it. `fill(box, target)`: reads a box
    straight into `target`, where the source can do that.
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

    def become(self, values: torch.Tensor) -> None:
        """Take over the stored values, which somebody else has read."""
        self._value = values

    def materialize(self) -> torch.Tensor:
        """The values, which stay here: a plain tensor, or a DTensor if this was changed together with one.

        Raises `CorruptShardError` for damaged bytes.
        """
        if self._value is None:
            self._value = self._read(_whole(self))
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

    def __getattr__(self, name: str) -> Any:
        """What a DTensor has beside a tensor (`full_tensor`, `placements`, ...), once this is one."""
        value = vars(self).get("_value")
        if isinstance(value, DTensor):
            return getattr(value, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

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
        use = _Use(tree_leaves((args, kwargs)))
        args, kwargs = tree_map(use.value_of, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if func is torch.Tensor.contiguous:
            return result  # a tensor of its own, as DeepSpeed's stand-ins give
        use.keep(result)
        return use.owner(result)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_value_of, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Use:
    """The values that one operation reads. `operands`: all that it works with."""

    def __init__(self, operands: Iterable[Any]) -> None:
        parts = [each for each in map(_shown, operands) if isinstance(each, DTensor)]
        self._alike = {part.shape: part for part in reversed(parts)}
        self._any = parts[0] if parts else None
        self._read: dict[int, tuple[LazyTensor, torch.Tensor, int | None]] = {}

    def value_of(self, given: Any) -> Any:
        if not isinstance(given, LazyTensor):
            return given
        if id(given) not in self._read:
            value = self._value(given)
            self._read[id(given)] = given, value, _version(value)
        return self._read[id(given)][1]

    def _value(self, given: LazyTensor) -> torch.Tensor:
        if self._any is None or isinstance(given._value, DTensor):
            return given._value if given._value is not None else given._read(_whole(given))
        like = self._alike.get(given.shape)
        return _replica(given, self._any) if like is None else _part(given, like)

    def keep(self, result: Any) -> None:
        """Keep the values that the operation changed, or that share memory with `result`; in doubt, all of them."""
        leaves = tree_leaves(result)
        unknown = not all(isinstance(leaf, _PLAIN) or _has_own_memory(leaf) for leaf in leaves)
        shared = {
            _memory(leaf) for leaf in leaves if not unknown and isinstance(leaf, torch.Tensor)
        }
        for lazy, value, version in self._read.values():
            changed = version is None or _version(value) != version
            if unknown or changed or _memory(value) in shared:
                lazy._value = value

    def owner(self, result: Any) -> Any:
        """The lazy tensor that the operation changed and returned, so that a chain of changes stays in it."""
        for lazy, value, version in self._read.values():
            if result is value and version is not None and _version(value) != version:
                return lazy
        return result


_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def _has_own_memory(leaf: Any) -> bool:
    local = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
    return type(local) in (torch.Tensor, torch.nn.Parameter) and local.layout is torch.strided


def _version(tensor: torch.Tensor) -> int | None:
    """A number that grows with every change in place; None where torch does not count changes."""
    if tensor.is_inference():
        return None
    return tensor._version + (tensor._local_tensor._version if isinstance(tensor, DTensor) else 0)


def _memory(tensor: torch.Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def _shown(value: Any) -> Any:
    """The values of a lazy tensor if they were read, else None; anything else as it is."""
    return value._value if isinstance(value, LazyTensor) else value


def _whole(value: LazyTensor) -> Box:
    return full_box(tuple(value.shape))


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


def _replica(value: LazyTensor, like: DTensor) -> DTensor:
    """The whole values on each rank of `like`'s mesh, which `like` can be combined with."""
    whole = value._value if value._value is not None else value._read(_whole(value))
    placements = [Replicate()] * like.device_mesh.ndim
    whole = whole.to(like.device)
    return DTensor.from_local(whole, like.device_mesh, placements, run_check=False)


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
