"""What torch's errors do not say of an optimizer that cannot step on DTensors: which one it is, and what to do."""

from __future__ import annotations

import traceback
from typing import Any

import torch

__all__ = ["tell_remedy"]

_NO_DTENSORS = (
    "mixed torch.Tensor and DTensor",
    "sharding strategy",
    "Sharding propagation failed",
)
"""What torch says of an operation that it cannot do on DTensors."""


def tell_remedy(error: BaseException, remedy: str) -> None:
    """Add the optimizer's class and `remedy` to an error of its step on DTensors; others stay as they are."""
    optimizer = _stepping(error)
    if optimizer:
        error.args = tuple(_with_remedy(text, optimizer, remedy) for text in error.args)


def _stepping(error: BaseException) -> str:
    """The class of the optimizer in whose step an error was raised, the innermost of several, or ""."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.optim.Optimizer) and frame.f_code.co_name == "step":
            found = type(owner).__name__
    return found


def _with_remedy(text: Any, optimizer: str, remedy: str) -> Any:
    if not isinstance(text, str) or not any(sign in text for sign in _NO_DTENSORS):
        return text
    return f"{text}\n{optimizer} cannot step on sharded parameters (DTensors). {remedy}"
