"""Test doubles for whoever trains with zero_ckpt and wants to see a save fail.

storage = FaultyStorage(LocalStorage(), fail_at(3, errno.ENOSPC), names={"write"})
checkpointer = zero_ckpt.Checkpointer(model, optimizer, storage=storage)      # the fourth write finds a full disk
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
)

__all__ = [
    "OPERATIONS",
    "FaultyStorage",
    "Operation",
    "delay_at",
    "fail_at",
    "fail_from",
    "kill_at",
]
