"""Warnings to the user, which name the user's own line. Imports no torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from types import FrameType

__all__ = ["alone_notice", "warn_on_first", "warn_user"]

_FRAMEWORKS = frozenset({"accelerate", "lightning", "pytorch_lightning", "torch", "transformers"})
_NOT_THE_USERS = _FRAMEWORKS | {"zero_ckpt", "contextlib", "threading"}
"""Top-level modules that may stand between the user's call and a warning."""


def warn_user(text: str) -> None:
    """Warn of `text` at the line of the user's code from which all of this was called."""
    level, frame = 1, sys._getframe()
    while _package(frame) in _NOT_THE_USERS and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def warn_on_first(rank: int, texts: Iterable[str]) -> None:
    """Warn, on rank 0 alone, of what all ranks know. Each of `texts` that is not empty is a warning of its own.

    Call it when the ranks have done what they do together: where warnings are errors, rank 0 leaves the call here.
    """
    for text in texts if rank == 0 else ():
        if text:
            warn_user(text)


def alone_notice() -> str:
    """What to tell a user whose launcher started several processes that no process group joins; "" otherwise.

    Only the process that the launcher calls rank 0 tells it.
    """
    started, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "0")
    dist = sys.modules.get("torch.distributed")
    joined = dist is not None and dist.is_available() and dist.is_initialized()
    if joined or rank != "0" or not started.isdecimal() or int(started) < 2:
        return ""
    return (
        f"WORLD_SIZE is {started}, but there is no process group: each of the {started} processes takes itself for the "
        "only one, and all save to the same place. Call torch.distributed.init_process_group() first."
    )


def _package(frame: FrameType) -> str:
    """The top-level package or module whose code `frame` runs."""
    return str(frame.f_globals.get("__name__")).partition(".")[0]
