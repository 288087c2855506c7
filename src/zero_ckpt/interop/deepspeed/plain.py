"""What the globals of a checkpoint's pickles stand for: plain Python, numpy and torch values, as inert data.

`CONSTRUCTORS` is all that a pickle can reach. None of it looks anything up by name, opens a file or imports a module.
"""

from __future__ import annotations

import datetime
import pathlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zero_ckpt.core.dtypes import TORCH_NAMES as _TORCH_NAMES
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.interop.deepspeed.records import Global, PickleError, Record
from zero_ckpt.interop.deepspeed.tensors import Storage, StoredTensor

__all__ = ["CONSTRUCTORS", "STORAGE_DTYPES", "TORCH_NAMES", "Array", "Device", "NumpyDtype", "Size"]

TORCH_NAMES = {
    **_TORCH_NAMES,
    "double": "F64",
    "float": "F32",
    "half": "F16",
    "long": "I64",
    "int": "I32",
    "short": "I16",
}
"""Names of dtypes in `torch` -> those that checkpoints use."""

STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
    "UntypedStorage": "U8",
}
"""Names of storage classes in `torch` -> dtype."""


MAX_EXPANDED = 1 << 28
"""Bytes that a tensor may have which shows elements of its storage more than once (an expanded one)."""


class Size(tuple[int, ...]):
    """A `torch.Size`."""

    __slots__ = ()


def _of(kind: Callable[[Any], Any], *accepted: type) -> Callable[..., Any]:
    """A constructor that takes the `accepted` containers only: a range, say, would become one of any size."""

    def make(items: Any = ()) -> Any:
        if items != () and type(items) not in accepted:
            raise TypeError(f"a {type(items).__name__}")
        return kind(items)

    return make


@dataclass(frozen=True, slots=True)
class Device:
    """A `torch.device`, as text."""

    name: str


@dataclass(slots=True, eq=False)
class NumpyDtype:
    """A numpy dtype: its kind and width (`f4`), and its byte order."""

    code: str
    order: str = "|"

    def set_state(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise PickleError(f"numpy byte order {order!r}")
        self.order = order

    @property
    def text(self) -> str:
        return f"{self.order}{self.code}" if self.order in "<>" else self.code


@dataclass(slots=True, eq=False)
class Array:
    """A numpy array, or (shape None) scalar. `data` None: of Python objects, which are not opened."""

    dtype: NumpyDtype | None = None
    shape: tuple[int, ...] | None = ()
    fortran: bool = False
    data: bytes | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, NumpyDtype) or not isinstance(data, (bytes, bytearray, str)):
            return
        if not isinstance(shape, tuple):
            raise PickleError("a numpy array without a shape")
        self.dtype, self.shape, self.fortran = dtype, shape, bool(fortran)
        self.data = data.encode("latin-1") if isinstance(data, str) else bytes(data)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    return _view(storage, offset, shape, strides, None)


def _typed_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> StoredTensor:
    name = TORCH_NAMES.get(dtype.name) if isinstance(dtype, Global) else None
    if name is None:
        raise PickleError(f"a tensor of the unknown dtype {dtype}")
    return _view(storage, offset, shape, strides, name)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without a storage")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise PickleError("a tensor without shape and strides")
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
        raise PickleError(f"a tensor of shape {shape!r}, strides {strides!r}, offset {offset!r}")
    tensor = StoredTensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))
    if tensor.span > storage.nbytes:
        raise PickleError(
            f"a tensor of shape {list(shape)} reaches {tensor.span} bytes into a storage of {storage.nbytes}"
        )
    if tensor.numel * itemsize(tensor.dtype) > max(storage.nbytes, MAX_EXPANDED):
        raise PickleError(f"a tensor of shape {list(shape)} in a storage of {storage.nbytes} bytes")
    storage.views.append(tensor)
    return tensor


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(make: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """A tensor that has Python attributes, which are left out."""
    found = _TENSORS.get(make.path) if isinstance(make, Global) else None
    if found is None or not isinstance(args, tuple):
        return Record(_FROM_TYPE, (make, _kind, args))
    return found(*args)


_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")

_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}

_FACTORIES = {
    "list": list,
    "dict": dict,
    "set": set,
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "tuple": tuple,
}


def _default_dict(factory: Any = None) -> Any:
    if factory is None:
        return defaultdict(None)
    if isinstance(factory, Global) and factory.module == "builtins":
        found = _FACTORIES.get(factory.name)
        if found is not None:
            return defaultdict(found)
    raise TypeError("another factory")


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as pickle protocol 2 spells them: text and its encoding."""
    if encoding not in ("latin1", "latin-1"):
        raise TypeError("another encoding")
    return text.encode("latin-1")


def _bytearray(data: Any = b"", encoding: str = "latin-1") -> bytearray:
    return bytearray(data if isinstance(data, bytes) else _encoded(data, encoding))


def _numpy_dtype(code: Any, *_: Any) -> NumpyDtype:
    if not isinstance(code, str):
        raise TypeError("no code")
    return NumpyDtype(code)


def _numpy_scalar(dtype: Any, data: Any = None) -> Array:
    if not isinstance(dtype, NumpyDtype) or not isinstance(data, (bytes, str)):
        raise TypeError("an object")
    return Array(dtype, None, False, data.encode("latin-1") if isinstance(data, str) else data)


def _numpy_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    plain = isinstance(data, (bytes, bytearray)) and isinstance(shape, tuple)
    if not isinstance(dtype, NumpyDtype) or not plain:
        raise TypeError("an object")
    return Array(dtype, shape, order == "F", bytes(data))


def _both(modules: str, found: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    return {f"{module}.{name}": make for module in modules.split() for name, make in found.items()}


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _of(Size, tuple, list),
    "torch.device": lambda kind, index=None: Device(kind if index is None else f"{kind}:{index}"),
    "collections.OrderedDict": _of(OrderedDict, list),
    "collections.Counter": _of(Counter, dict),
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encoded,
    "datetime.datetime": datetime.datetime,
    "datetime.date": datetime.date,
    "datetime.timedelta": datetime.timedelta,
    "datetime.timezone": datetime.timezone,
    "numpy.dtype": _numpy_dtype,
    **_both(
        "builtins",
        {
            "set": _of(set, list, tuple),
            "frozenset": _of(frozenset, list, tuple),
            "complex": complex,
            "slice": slice,
            "range": range,
            "bytes": _of(bytes),
            "bytearray": _bytearray,
        },
    ),
    **_both(
        "pathlib pathlib._local",
        {
            "Path": pathlib.PurePosixPath,
            "PosixPath": pathlib.PurePosixPath,
            "PurePosixPath": pathlib.PurePosixPath,
            "WindowsPath": pathlib.PureWindowsPath,
            "PureWindowsPath": pathlib.PureWindowsPath,
        },
    ),
    **_both(
        "numpy.core.multiarray numpy._core.multiarray numpy.core.numeric numpy._core.numeric",
        {
            "_reconstruct": lambda *_: Array(),
            "scalar": _numpy_scalar,
            "_frombuffer": _numpy_buffer,
        },
    ),
}
"""Global -> what makes its value. A global that is not here becomes a `Record`."""
