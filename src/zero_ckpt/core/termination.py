"""SIGTERM while saves are in flight: their commit first, then the end of the process. For a stated time at most."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

__all__ = ["TerminationGuard"]


class TerminationGuard:
    """Lets SIGTERM wait until `is_busy` says no, `grace` seconds at most, before it ends the process as ever.

    Only where nobody else handles the signal: a handler of the user's or the framework's decides for itself, and a
    process that it ends in the ordinary way waits for its saves then. `is_busy` is called in a signal handler: it may
    not take locks.
    """

    def __init__(self, is_busy: Callable[[], bool], grace: float) -> None:
        self._is_busy, self._grace = is_busy, grace
        self._installed = False

    def install(self) -> None:
        """Do nothing on another thread than the main one, where Python allows no handlers."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True

    def remove(self) -> None:
        if self._installed and threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) == self._on_signal:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._installed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        end = time.monotonic() + self._grace
        while self._is_busy() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), number)
