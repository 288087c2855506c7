"""Test doubles for whoever trains with zero_ckpt and wants to see a save fail, or writes a `Storage`.

    storage = FaultyStorage(LocalStorage(), fail_at(3, errno.ENOSPC), names={"write"})
    checkpointer = zero_ckpt.Checkpointer(model, optimizer, storage=storage)  # the fourth write finds a full disk

`FaultyStorage` fails, is slow, or kills its process at a chosen operation; `RecordingStorage` knows what a power
failure at any moment would have left; `zero_ckpt.testing.conformance` is what every `Storage` must do, as tests.
"""

from __future__ import annotations

from zero_ckpt.testing.faults import (
    OPERATIONS,
    FaultyStorage,
    Operation,
    delay_at,
    fail_at,
    fail_from,
    kill_at,
    short_at,
)
from zero_ckpt.testing.recording import Moment, RecordingStorage

__all__ = [
    "OPERATIONS",
    "FaultyStorage",
    "Moment",
    "Operation",
    "RecordingStorage",
    "delay_at",
    "fail_at",
    "fail_from",
    "kill_at",
    "short_at",
]
