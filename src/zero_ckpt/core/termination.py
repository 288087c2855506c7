"""SIGTERM while saves are in flight: their commit first, then the end of the process. For a stated time at most.

A handler of Python's runs on the main thread, when that comes back from what it waits for: a collective, a long sleep.
The system may also hand the signal to another thread, and then nothing wakes the main one. So a thread of our own is
woken by the signal itself, through a pipe, and does what is to be done.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from zero_ckpt.core.threads import start_thread

__all__ = ["TerminationGuard"]


class TerminationGuard:
    """Lets SIGTERM wait until `is_busy` says no, `grace` seconds at most, before it ends the process as ever.

    Only where nobody else handles the signal: a handler of the user's or the framework's decides for itself, and a
    process that it ends in the ordinary way waits for its saves then. `is_busy` may not take locks.
    """

    def __init__(self, is_busy: Callable[[], bool], grace: float) -> None:
        self._is_busy, self._grace = is_busy, grace
        self._pipe: tuple[int, int] | None = None
        self._ending = threading.Lock()

    def install(self) -> None:
        """Do nothing on another thread than the main one, where Python allows no handlers."""
        is_main = threading.current_thread() is threading.main_thread()
        if self._pipe or not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        reading, writing = os.pipe()
        thread = threading.Thread(
            target=self._watch, args=(reading,), name="zero_ckpt-sigterm", daemon=True
        )
        try:
            start_thread(thread)
        except MemoryError:
            os.close(reading)
            os.close(writing)
            raise
        self._pipe = reading, writing
        os.set_blocking(writing, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        if before != -1:  # an event loop's, which wakes the main thread by itself
            signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, self._on_signal)
        guard = weakref.ref(self)

        def in_child() -> None:  # no thread of ours is there
            if (here := guard()) is not None:
                here.remove()

        os.register_at_fork(after_in_child=in_child)

    def remove(self) -> None:
        if self._pipe is None or threading.current_thread() is not threading.main_thread():
            return
        _, writing = self._pipe
        self._pipe = None
        if self._is_ours():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        found = signal.set_wakeup_fd(-1)
        if found not in (writing, -1):
            signal.set_wakeup_fd(found)
        os.close(writing)  # which ends the thread; it closes the other end

    def _is_ours(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._on_signal

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._end()

    def _watch(self, reading: int) -> None:
        with suppress(OSError):
            while numbers := os.read(reading, 64):
                # Somebody may have taken the signal over since.
                if signal.SIGTERM in numbers and self._is_ours():
                    self._end()
        os.close(reading)

    def _end(self) -> None:
        """End the process, when its saves are done. Once: two threads may hear of the signal."""
        if not self._ending.acquire(blocking=False):
            return
        end = time.monotonic() + self._grace
        while self._is_busy() and time.monotonic() < end:
            time.sleep(0.02)
        ctypes.CDLL(None).signal(int(signal.SIGTERM), None)  # as `signal.signal`, from any thread
        os.kill(os.getpid(), signal.SIGTERM)
