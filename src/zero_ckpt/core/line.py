"""A line to a rendezvous store that may stop answering: calls are made on a thread of its own, and given up on in time.

A store's client waits for an answer without limit, whatever its timeout says (`check`, `compare_set`, `delete_key`): a
store whose machine hangs, or that a network swallows, would stop every rank for ever. Knows nothing of what is asked.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from zero_ckpt.core.threads import start_thread

__all__ = ["Line", "StoreError"]

T = TypeVar("T")

_FAREWELL = 0.5
"""Seconds that a thread which still waits for an answer may delay the end of its line."""


class StoreError(RuntimeError):
    """The store did not answer, or a call of it failed. No error of a signal handler that ran while a rank waited."""


class _Job:
    """Calls to make one after the other; what they returned, or the error that ended them."""

    def __init__(self, calls: Iterable[Callable[[], Any]]) -> None:
        self._calls = calls
        self.results: list[Any] = []
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.is_given_up = False

    def run(self, answered: Callable[[], None]) -> None:
        try:
            for call in self._calls:
                if self.is_given_up:
                    return
                self.results.append(call())
                answered()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


class _Server:
    """The thread's side, which must not keep the line alive."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.answers = 0
        self._thread = threading.Thread(target=self._run, name="zero_ckpt-store", daemon=True)
        start_thread(self._thread)

    def end(self) -> None:
        self.jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(_FAREWELL)

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            job.run(self._count)
            del job  # it holds whoever asked

    def _count(self) -> None:
        self.answers += 1


class Line:
    """Makes calls in the order in which they were given, from any thread. A call that fails raises a StoreError."""

    def __init__(self) -> None:
        self._server = _Server()
        self._stuck: _Job | None = None
        weakref.finalize(self, self._server.end)

    def ask(self, calls: Iterable[Callable[[], T]], patience: float) -> list[T]:
        """What the calls return.

        Raises StoreError when there was no answer for `patience` seconds; further questions then fail at once, until
        the store has answered. Of calls that were given up on, only the one that the store has already is still made.
        """
        if self._stuck is not None and not self._stuck.done.is_set():
            raise StoreError("it still does not answer")
        self._stuck = None
        job = _Job(calls)
        seen = self._server.answers
        self._server.jobs.put(job)
        while not job.done.wait(patience):
            if seen == self._server.answers:
                job.is_given_up, self._stuck = True, job
                raise StoreError(f"it has not answered for {patience:g} s")
            seen = self._server.answers
        if isinstance(job.error, RuntimeError):
            raise StoreError(str(job.error)) from job.error
        if job.error is not None:
            raise job.error
        return job.results

    def tell(self, call: Callable[[], object]) -> None:
        """Make this call when the store gets to it. Nobody waits for it, or learns of its errors."""
        self._server.jobs.put(_Job([call]))
