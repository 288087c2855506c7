"""Which stored tensors a full state dict has, under which names and in which dtype. Pure.

Parameters in floating types narrower than fp32 become fp32; fp32 and wider ones, and everything that is no floating
parameter (buffers, integers, complex), stay bitwise as they were saved. So no value is ever rounded on the way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.planner import Placed
from zero_ckpt.errors import ConfigurationError

__all__ = ["DTYPES", "OutTensor", "check_dtype", "select", "stored_tensor"]

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "keep": None}
"""What a user may ask for -> the dtype of floating parameters in the output; None leaves each as stored."""

_NARROW = frozenset({"F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"})
_FLOATING = _NARROW | {"F32", "F64"}


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of the output. `names`: its own, then those of weights tied to it; `dtype`: as it is written."""

    names: tuple[str, ...]
    role: str
    key: str
    placed: Placed
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.placed.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


def stored_tensor(role: str, key: str, placed: Placed) -> OutTensor:
    """A stored tensor as it is, under its own name."""
    return OutTensor((key,), role, key, placed, placed.dtype)


def check_dtype(dtype: str) -> None:
    """Raises `ConfigurationError` for what is no choice of dtype."""
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype is one of {', '.join(DTYPES)}; found {dtype!r}")


def select(
    manifest: Manifest,
    *,
    dtype: str = "fp32",
    exclude_frozen_parameters: bool = False,
    strip_prefix: str | None = None,
) -> list[OutTensor]:
    """The model's tensors in the order of the save. Raises `ConfigurationError`."""
    check_dtype(dtype)
    dropped = frozenset(manifest.frozen) if exclude_frozen_parameters else frozenset[str]()
    buffers = frozenset(manifest.buffers)
    tied: dict[str, list[str]] = {}
    for alias, key in manifest.aliases.items():
        tied.setdefault(key, []).append(alias)
    chosen = [
        OutTensor(
            (key, *tied.get(key, ())),
            "model",
            key,
            placed,
            placed.dtype if key in buffers else _written(placed.dtype, dtype),
        )
        for key, placed in manifest.tensors["model"].items()
        if key not in dropped
    ]
    return chosen if strip_prefix is None else _stripped(chosen, strip_prefix)


def _written(stored: str, choice: str) -> str:
    wanted = DTYPES[choice]
    if wanted is None or stored not in _FLOATING:
        return stored
    return stored if wanted == "F32" and stored not in _NARROW else wanted


def _stripped(tensors: list[OutTensor], prefix: str) -> list[OutTensor]:
    """Names that start with `prefix` lose it; others stay."""
    names = [name for tensor in tensors for name in tensor.names]
    if not any(name.startswith(prefix) for name in names):
        raise ConfigurationError(
            f"no tensor's name starts with the prefix to strip, {prefix!r}; names are like {names[:3]}"
        )
    counts = Counter(name.removeprefix(prefix) for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"without the prefix {prefix!r} several tensors would have one name: {twice[:3]}"
        )
    return [
        OutTensor(tuple(n.removeprefix(prefix) for n in t.names), t.role, t.key, t.placed, t.dtype)
        for t in tensors
    ]
