"""Warnings to the user, which name the user's own line. Imports no torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

__all__ = ["warn_on_first", "warn_user"]

_FRAMEWORKS = frozenset({"accelerate", "lightning", "pytorch_lightning", "torch", "transformers"})
_NOT_THE_USERS = _FRAMEWORKS | {"zero_ckpt", "contextlib", "threading"}
"""Top-level modules that may stand between the user's call and a warning."""


def warn_user(text: str) -> None:
    """Warn of `text` at the line of the user's code from which all of this was called."""
    level, frame = 1, sys._getframe()
    while _is_inside(str(frame.f_globals.get("__name__"))) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def warn_on_first(rank: int, texts: Iterable[str]) -> None:
    """Warn of what all ranks know, once for the job. Each of `texts` that is not empty is a warning of its own.

    Call it when all ranks have done what they do together: a warning may be an error where it is told.
    """
    for text in texts if rank == 0 else ():
        if text:
            warn_user(text)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in _NOT_THE_USERS
