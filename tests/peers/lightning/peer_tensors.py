"""Lets Lightning's tests compare weights that stay sharded after fit with plain ones.

At stages 2 and 3 a module's parameters are DTensors, before, in and after fit. PyTorch compares no
DTensor with a plain tensor, so the comparisons that tests use get the whole values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor

__all__ = ["compare_whole_tensors"]


def compare_whole_tensors() -> None:
    for name in ("allclose", "equal", "eq"):
        setattr(torch, name, _with_whole(getattr(torch, name)))
    torch.testing.assert_close = _with_whole(torch.testing.assert_close)


def _with_whole(compare: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compare)
    def on_whole(*args: Any, **options: Any) -> Any:
        return compare(*(_whole(each) for each in args), **options)

    return on_whole


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
