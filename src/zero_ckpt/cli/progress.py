"""A progress line on the error stream of a terminal; nothing anywhere else."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from zero_ckpt.cli.text import size_text

__all__ = ["Progress"]

WIDTH = 24
"""Characters of the bar."""

INTERVAL = 0.1
"""Seconds between two drawings."""


class Progress:
    """`verifying  [#########     ]  38%  1.2 GB of 3.0 GB  2.1 GB/s`. Calls may come from any thread.

    Use it in a `with` statement: the line is gone afterwards, so that only results stay on the screen.
    """

    def __init__(self, label: str, total: int = 0, stream: TextIO | None = None) -> None:
        self._label, self._total, self._done = label, total, 0
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._next = self._start + INTERVAL

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def add(self, nbytes: int) -> None:
        """`nbytes` more are done."""
        with self._lock:
            self._done += nbytes
            self._draw()

    def set(self, done: int, total: int) -> None:
        """`done` of `total` bytes are done."""
        with self._lock:
            self._done, self._total = done, total
            self._draw()

    def clear(self) -> None:
        """Make room for a line of output."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _draw(self) -> None:
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + INTERVAL
        self._stream.write(f"\r{self.line(now - self._start)}\x1b[K")
        self._stream.flush()

    def line(self, seconds: float) -> str:
        share = min(1.0, self._done / self._total) if self._total else 0.0
        bar = "#" * int(share * WIDTH)
        return (
            f"{self._label}  [{bar:<{WIDTH}}] {share:4.0%}  {size_text(self._done)} of "
            f"{size_text(self._total)}  {size_text(self._done / max(seconds, 1e-9))}/s"
        )
