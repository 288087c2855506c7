"""Which ranks are lost: a rank that has died on this host, or has been silent for too long.

Every rank files who it is (host, process, start time) and, while it makes progress, a growing number (`beat`). Any rank
can so judge any other without asking it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["PATIENCE", "Watch", "has_died", "identity", "name_ranks"]

PATIENCE = 30.0
"""Seconds of silence after which the user is told which ranks are being waited for."""


class Watch:
    """Decides which of the awaited ranks are lost. Looks once a second, or oftener for short timeouts.

    `peek` gives what a rank filed under `who/<rank>` or `beat/<rank>`, or None.
    """

    def __init__(self, peek: Callable[[str], bytes | None], timeout: float) -> None:
        self._peek, self._timeout = peek, timeout
        self._interval = min(1.0, timeout / 4)
        self._next = time.monotonic() + self._interval
        self._started = time.monotonic()
        self._seen: dict[int, tuple[bytes | None, float]] = {}
        self._has_told = False

    def is_due(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._interval
        return True

    def lost(self, ranks: Iterable[int]) -> str:
        """Says which of `ranks` are lost, and how; "" when none is."""
        dead, silent = [], []
        for rank in ranks:
            if self._is_dead(rank):
                dead.append(rank)
            elif self._is_silent(rank):
                silent.append(rank)
        parts = [f"{name_ranks(dead)} died"] if dead else []
        if silent:
            parts.append(
                f"{name_ranks(silent)} did not arrive or make progress for {self._timeout:g} s"
            )
        return " and ".join(parts)

    def awaited(self, ranks: Iterable[int]) -> str:
        """Says, once, which of `ranks` have been silent for `PATIENCE` and are not lost yet. Call it after `lost`."""
        now = time.monotonic()
        slow = [r for r in ranks if now - self._seen.get(r, (None, now))[1] > PATIENCE]
        if self._has_told or not slow:
            return ""
        self._has_told = True
        return (
            f"{name_ranks(slow)} did not arrive or make progress for {PATIENCE:g} s; "
            f"after {self._timeout:g} s that is an error"
        )

    def _is_dead(self, rank: int) -> bool:
        who = self._peek(f"who/{rank}")
        return who is not None and has_died(json.loads(who))

    def _is_silent(self, rank: int) -> bool:
        now, beat = time.monotonic(), self._peek(f"beat/{rank}")
        last, since = self._seen.get(rank, (beat, self._started))
        if beat != last:
            since = now
        self._seen[rank] = beat, since
        return now - since > self._timeout


def name_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def identity() -> list[str | int]:
    """Boot of the host, process namespace, process id and start: enough for others on this host to tell if it lives."""
    return [*_host(), os.getpid(), _start_time(os.getpid()) or ""]


def _host() -> tuple[str, str]:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    return "", ""


def _start_time(pid: int) -> str | None:
    """Clock ticks since boot at which a process started; None when it is gone or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def has_died(who: list[Any]) -> bool:
    """Whether the process of an `identity` is certainly gone. One on another host cannot be judged: False."""
    boot, namespace, pid, started = who
    if not boot or not started or (boot, namespace) != _host():
        return False
    return bool(_start_time(pid) != started)
