"""Names and sizes of element types, as the safetensors format spells them. Imports no torch.

Types that safetensors has are stored as themselves. The others that torch has are stored as bytes (`U8`, with one
more trailing dimension) and keep their own name in the manifest and in the shard's chunk table.
"""

from __future__ import annotations

__all__ = ["ITEMSIZE", "NATIVE", "TORCH_NAMES", "itemsize", "stored_dtype", "stored_shape"]

NATIVE = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
}
"""Bytes of one element of each type that shard files hold as itself."""

_AS_BYTES = {"C128": 16, "C32": 4, "F4_E2M1X2": 1}

ITEMSIZE = NATIVE | _AS_BYTES
"""Bytes of one element of every type that a checkpoint may hold."""

TORCH_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "complex128": "C128",
    "complex32": "C32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""Names of dtypes in `torch`, but for those that pack several numbers into an element."""


def itemsize(dtype: str) -> int:
    """Bytes of one element. Raises KeyError for a name that this version does not know."""
    return ITEMSIZE[dtype]


def stored_dtype(dtype: str) -> str:
    """The type that the safetensors header names."""
    return dtype if dtype in NATIVE else "U8"


def stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the safetensors header names."""
    return shape if dtype in NATIVE else (*shape, _AS_BYTES[dtype])
