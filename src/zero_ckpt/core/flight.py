"""One save on its way beside the training: a thread that finishes the transaction, and the handle that tells of it."""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from zero_ckpt.core.handle import SaveHandle
from zero_ckpt.core.threads import start_thread
from zero_ckpt.core.transaction import Transaction
from zero_ckpt.errors import SaveError, describe

__all__ = ["Flight"]

_THREAD = "zero_ckpt-save"
"""The name of the threads on which saves run."""

_UNTOLD: dict[Flight, None] = {}
"""Saves that have failed without anybody being told, oldest first. What is left of them at exit is printed."""


class Flight(SaveHandle):
    """Runs `transaction.finish` on a thread of its own, which the process waits for before it exits.

    Saves commit in the order in which they began: it votes when `earlier` ones are done, and where one of them writes
    to the same tag it does not even begin before.
    """

    def __init__(self, transaction: Transaction, earlier: Sequence[Flight]) -> None:
        self.path = f"{transaction.request.directory}/{transaction.request.tag}"
        self.tag = transaction.request.tag
        self.error: BaseException | None = None
        self._transaction: Transaction | None = transaction
        self.timings = transaction.timings
        self.timings["fence"] = 0.0
        self.notices = transaction.notices  # the same on all ranks
        self.mishaps: list[str] = []  # this rank's own
        self._place = transaction.request.directory, transaction.request.tag
        self._earlier = list(earlier)
        self._is_staged, self._is_done = threading.Event(), threading.Event()
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._then: list[Callable[[bool], None]] = []
        transaction.staged = self._is_staged.set
        transaction.going_on = self._check_given_up
        transaction.before_vote = self._await_earlier
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=False)

    def start(self) -> None:
        """Begin. Without room for a thread the save is made on this one, so that all ranks get the same outcome."""
        try:
            start_thread(self._thread)
        except MemoryError:
            self._run()

    @property
    def committed(self) -> bool:
        return self.done and self.error is None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._is_done.is_set()

    @property
    def is_running(self) -> bool:
        """As `not done`, for signal handlers: takes no lock."""
        return self._thread.is_alive()

    def staged(self) -> None:
        begin = time.perf_counter()
        self._is_staged.wait()
        self.timings["fence"] += time.perf_counter() - begin

    def wait(self) -> None:
        self._is_done.wait()
        self.told()
        if self.error is not None:
            raise self.error

    def join(self) -> None:
        """Return when it has ended; raises nothing."""
        self._is_done.wait()

    @property
    def is_untold(self) -> bool:
        """Whether it has failed, and nobody has got the error."""
        return self in _UNTOLD

    def told(self) -> None:
        """Somebody gets the error of this flight, which has ended."""
        _UNTOLD.pop(self, None)

    @property
    def is_given_up(self) -> bool:
        """Whether it ended without a commit because it was told to."""
        return self._given_up.is_set() and self.error is not None

    def give_up(self) -> None:
        """Ask it to end without a commit. It commits all the same when every rank has written its files by now."""
        self._given_up.set()

    def then(self, action: Callable[[bool], None]) -> bool:
        """Do `action(committed)` on its thread when it ends. False when it has ended already."""
        with self._lock:
            if not self.done:
                self._then.append(action)
            return not self.done

    def _run(self) -> None:
        transaction, self._transaction = self._transaction, None
        assert transaction is not None
        try:
            for flight in self._earlier:
                if flight._place == self._place:
                    flight.join()
            self.path, self.tag = transaction.finish()
        except BaseException as error:
            self.error = error.with_traceback(None)  # whose frames hold the live tensors
            _UNTOLD[self] = None
        finally:
            self._is_staged.set()
            self._finish()

    def _finish(self) -> None:
        """Do all that `then` was given, also while this runs; and only then count as done."""
        while True:
            with self._lock:
                actions, self._then = self._then, []
                if not actions:
                    self._earlier.clear()
                    self._is_done.set()
                    return
            for action in actions:
                self._do(action)

    def _do(self, action: Callable[[bool], None]) -> None:
        try:
            action(self.error is None)
        except Exception as error:
            self.mishaps.append(
                f"{self.path} was saved, but what follows a save failed: {describe(error)}"
            )

    def _await_earlier(self) -> None:
        for flight in self._earlier:
            flight.join()

    def _check_given_up(self) -> None:
        if self._given_up.is_set():
            raise SaveError(f"{self.path}: given up for a newer save, as when_busy='replace' says.")


# At exit: saves under way end first, and failures that nobody has been told of are printed.


def _land() -> None:
    """Return when no save of this process is under way."""
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join()


# Python waits for the threads of saves by itself, but first closes all thread pools: without one, clients of object
# stores look up no address. What is registered there is called in reverse order: this before what `start_thread`'s
# module has imported. In an exit handler it is too late, and in other Pythons there may be no such thing.
with suppress(AttributeError, RuntimeError):
    threading._register_atexit(_land)  # type: ignore[attr-defined]


@atexit.register
def _tell_at_exit() -> None:
    """Saves have ended by now, but for those that exit handlers have begun."""
    _land()
    untold = [flight for flight in _UNTOLD if not flight.is_given_up]
    for flight in untold:
        print(f"zero_ckpt: {flight.path} was not saved: {flight.error}", file=sys.stderr)
    if untold:
        _end_with_status_1()


def _end_with_status_1() -> None:
    """For whoever started this process. Python's exit handlers cannot change the status; the C library's can.

    It calls this one when Python has ended in the ordinary way, with all handlers of others.
    """
    library = ctypes.CDLL(None)
    with suppress(AttributeError):  # no such call on this system
        end = ctypes.cast(library._exit, ctypes.c_void_p)
        library.__cxa_atexit(end, ctypes.c_void_p(1), None)
