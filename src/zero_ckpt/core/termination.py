"""SIGTERM while saves are in flight: they commit first, within a stated time, and then the process ends.

Python runs signal handlers on the main thread, and only when that comes back from what it waits for: a collective, a
long sleep. The system may also hand the signal to another thread, and then nothing wakes the main one. So a thread of
our own is woken by the signal itself, through a pipe, and waits for the saves.
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
    """Delays the end of the process by SIGTERM until `is_busy` says no, `grace` seconds at most.

    Only where nobody else handles the signal: a handler of the user's or the framework's decides for itself, and a
    process that it ends in the ordinary way waits for its saves. With several guards the process waits for all of them.
    `is_busy` may not take locks.
    """

    def __init__(self, is_busy: Callable[[], bool], grace: float) -> None:
        self.is_busy, self.grace = is_busy, grace

    def install(self) -> None:
        """Begin to guard. Does nothing on other threads than the main one, where Python allows no signal handlers."""
        if threading.current_thread() is threading.main_thread() and _handler.install():
            _handler.guards = [*_others_than(self), weakref.ref(self)]

    def remove(self) -> None:
        if threading.current_thread() is threading.main_thread():
            _handler.guards = _others_than(self)
            if not _handler.guards:
                _handler.remove()


class _Handler:
    """The process's one handler, and the thread that hears of the signal when the main one sleeps.

    `guards` is replaced and never changed: the thread goes through it while others come and go.
    """

    def __init__(self) -> None:
        self.guards: list[weakref.ref[TerminationGuard]] = []
        self._pipe: tuple[int, int] | None = None
        self._ending = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def install(self) -> bool:
        """Whether the signal is ours, now or already."""
        if self._pipe is not None and self._is_ours():
            return True
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return False
        self.remove()  # somebody has taken the signal, and given it back to the system
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
        return True

    def remove(self) -> None:
        if self._pipe is None:
            return
        _, writing = self._pipe
        self._pipe = None
        if self._is_ours():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        found = signal.set_wakeup_fd(-1)
        if found not in (writing, -1):
            signal.set_wakeup_fd(found)
        os.close(writing)  # which ends the thread; it closes the other end

    def _forget(self) -> None:
        """Let go of the signal in a forked child, which has no thread of ours."""
        self.guards = []
        if threading.current_thread() is threading.main_thread():
            self.remove()

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
        begin = time.monotonic()
        while any(guard.grace > time.monotonic() - begin for guard in self._busy()):
            time.sleep(0.02)
        ctypes.CDLL(None).signal(int(signal.SIGTERM), None)  # as `signal.signal`, from any thread
        os.kill(os.getpid(), signal.SIGTERM)

    def _busy(self) -> list[TerminationGuard]:
        return [guard for ref in self.guards if (guard := ref()) is not None and guard.is_busy()]


_handler = _Handler()


def _others_than(guard: TerminationGuard) -> list[weakref.ref[TerminationGuard]]:
    return [ref for ref in _handler.guards if ref() is not None and ref() is not guard]
