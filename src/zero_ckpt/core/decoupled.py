"""The async ("decoupled") engine: a save returns at once, and is staged, written and committed beside the training.

Weights and optimizer state change in `optimizer.step()` only. So `save` takes references to them, copies at once what
may change before (buffers, client state, gradients), and returns; a thread copies the rest into staging buffers under
the next forward and backward, and the next step of any optimizer waits until it has (the fence). Then it writes and
commits as the sync engine does, over connections of its own: never over the training's process groups.

What goes wrong there is raised at the next save, in `wait`, or in `close`, the same on every rank.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zero_ckpt.core.control import ControlPlane
from zero_ckpt.core.dtensors import local_tensor
from zero_ckpt.core.engine import SyncEngine, is_on_cuda
from zero_ckpt.core.flight import Flight
from zero_ckpt.core.handle import SaveHandle, Skipped
from zero_ckpt.core.memory import available_bytes
from zero_ckpt.core.notices import warn_on_first, warn_user
from zero_ckpt.core.saving import Captured, ShardPlan
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.staging import StagingPool
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.termination import TerminationGuard
from zero_ckpt.core.threads import start_thread
from zero_ckpt.core.transaction import Request
from zero_ckpt.errors import ConfigurationError

__all__ = ["AsyncEngine", "AsyncSave", "make_engine"]

_logger = logging.getLogger("zero_ckpt")

WHEN_BUSY = ("wait", "skip", "replace")


@dataclass(frozen=True, slots=True)
class AsyncSave:
    """How saves run beside the training.

    staging_bytes: host memory of this rank for copies of its state. None: as much as it writes, at most a quarter of
        what is free when it is first needed, shared by the ranks of this host. A larger state is staged in pieces,
        and the next optimizer step waits for the disk to take what has no room.
    when_busy: what a save does while `max_in_flight` earlier ones are under way: "wait" for the oldest, "skip" this
        one, or "replace" those by this one.
    max_in_flight: saves under way at a time.
    check_staging: compare what was staged with the live tensors once more before the next step may begin: finds code
        that changes them in ways that leave no trace (`tensor.data`). For debugging; it takes as long as the staging.
    grace: seconds that SIGTERM waits for a commit before it ends the process.
    """

    staging_bytes: int | None = None
    when_busy: str = "wait"
    max_in_flight: int = 1
    check_staging: bool = False
    grace: float = 30.0

    def __post_init__(self) -> None:
        if self.when_busy not in WHEN_BUSY:
            raise ConfigurationError(
                f"when_busy={self.when_busy!r}: expected one of {', '.join(WHEN_BUSY)}."
            )
        if self.max_in_flight < 1:
            raise ConfigurationError(f"max_in_flight={self.max_in_flight}: expected at least 1.")
        if self.staging_bytes is not None and self.staging_bytes < 6 * BLOCK:
            raise ConfigurationError(
                f"staging_bytes={self.staging_bytes}: expected at least {6 * BLOCK}, or None."
            )


def make_engine(async_save: bool | AsyncSave, storage: Storage | None = None) -> SyncEngine:
    """The engine that a user asked for: with `async_save`, beside the training."""
    if not async_save:
        return SyncEngine(storage=storage)
    return AsyncEngine(AsyncSave() if async_save is True else async_save, storage=storage)


class AsyncEngine(SyncEngine):
    """Saves beside the training. `save` is called by every rank, from the thread that trains."""

    is_async = True

    def __init__(
        self,
        options: AsyncSave | None = None,
        *,
        storage: Storage | None = None,
        control: ControlPlane | None = None,
    ) -> None:
        self.options = options or AsyncSave()
        self._flights: list[Flight] = []
        self._saves = 0
        self._ceiling = 0
        self._has_said = False
        self._pool_lock = threading.Lock()
        self._fence_hook: Any = None
        super().__init__(storage=storage, control=control)
        self._guard = TerminationGuard(self._is_busy, self.options.grace)

    def _run(self, request: Request, snapshot: Snapshot | Callable[[], Snapshot]) -> SaveHandle:
        if not self._make_room(request):
            return Skipped(f"{request.directory}/{request.tag}", request.tag)
        slot = self._saves % self.options.max_in_flight
        transaction = self._transaction(request, self._control_named(f"async-{slot}"))
        transaction.recheck = self.options.check_staging
        transaction.begin(snapshot)
        transaction.detach()
        flight = Flight(transaction, [f for f in self._flights if not f.done])
        self._saves += 1
        self._flights.append(flight)
        self._watch_steps()
        with suppress(MemoryError):  # the next save tries again
            self._guard.install()
        flight.start()
        return flight

    def fence(self) -> None:
        """Return when all that was saved is staged, so that live tensors may change."""
        for flight in self._flights:
            if not flight.done:
                flight.staged()

    def wait(self) -> None:
        """Return when every save is committed, or raise the first failure: the same on every rank."""
        self._settle(len(self._flights))

    def after_saves(self, action: Callable[[bool], None]) -> None:
        """Do `action(committed)` when the newest save has ended, then on another thread."""
        newest = self._flights[-1] if self._flights else None
        if newest is None or not newest.then(action):
            action(newest is None or newest.committed)

    def close(self) -> None:
        """Wait for all saves; let go of buffers and hooks. Another save makes new ones."""
        try:
            self.wait()
        finally:
            self._guard.remove()
            if self._fence_hook is not None:
                self._fence_hook.remove()
                self._fence_hook = None
            super().close()

    def warm(self, models: Iterable[nn.Module], has_optimizer: bool) -> None:
        """Make staging memory beside the training, before the first save needs it."""
        models = list(models)
        nbytes = _expected_bytes(models, has_optimizer, self.control.world_size)
        pinned = any(p.is_cuda for model in models for p in model.parameters())
        thread = threading.Thread(
            target=self._grown_pool, args=(nbytes, pinned), name="zero_ckpt-warm", daemon=True
        )
        with suppress(MemoryError):  # the save will find out whether there is enough for it
            start_thread(thread)

    def _make_room(self, request: Request) -> bool:
        """By `when_busy`; False: skip this save. Raises what earlier saves failed with. Every rank does the same."""
        surplus = len(self._flights) - self.options.max_in_flight + 1
        if self.options.when_busy == "wait" or not self._busy_anywhere(request.timeout):
            self._settle(surplus)
            return True
        if self.options.when_busy == "skip":
            return False
        for flight in self._flights:
            flight.give_up()
        self._settle(len(self._flights))
        return True

    def _busy_anywhere(self, timeout: float) -> bool:
        """Whether `max_in_flight` saves are under way on some rank."""
        here = sum(not flight.done for flight in self._flights) >= self.options.max_in_flight
        answer = self._control_named("async-busy").meet(
            "save: busy", b"1" if here else b"", lambda all: b"1" if any(all) else b"", timeout
        )
        return bool(answer)

    def _settle(self, count: int) -> None:
        """Await the `count` oldest saves and forget them; raise the first failure that was not told yet."""
        settled = self._flights[: max(0, count)]
        for flight in settled:
            flight.join()
        del self._flights[: len(settled)]
        untold = [flight for flight in settled if flight.is_untold]
        for flight in untold:
            flight.told()
        notices = [text for flight in settled for text in flight.notices]
        given_up = [str(flight.error) for flight in untold if flight.is_given_up]
        warn_on_first(self.control.rank, [*notices, *given_up])
        for text in (text for flight in settled for text in flight.mishaps):
            warn_user(text)
        for flight in untold:
            if flight.error is not None and not flight.is_given_up:
                raise flight.error

    def _staging_pool(self, captured: Captured, shards: list[ShardPlan]) -> StagingPool:
        return self._grown_pool(sum(s.layout.nbytes for s in shards), is_on_cuda(captured))

    def _grown_pool(self, nbytes: int, pinned: bool) -> StagingPool:
        with self._pool_lock:
            if self._pool is None:
                self._ceiling = self.options.staging_bytes or _default_ceiling(self.control)
                self._pool = StagingPool(pinned=pinned)
            pool = self._pool
        wanted = -(-nbytes // BLOCK) + 6  # each file's header and tail take a buffer, too
        pool.grow(min(wanted * self.options.max_in_flight, self._ceiling // BLOCK))
        if nbytes > self._ceiling:
            self._say_in_pieces(nbytes)
        return pool

    def _say_in_pieces(self, nbytes: int) -> None:
        if not self._has_said:
            self._has_said = True
            _logger.warning(
                "this rank saves %.2f GB and has staging memory for %.2f GB: the optimizer step after a save waits "
                "until the disk has taken the difference. AsyncSave(staging_bytes=...) allows more.",
                nbytes / 1e9,
                self._ceiling / 1e9,
            )

    def _is_busy(self) -> bool:
        """For signal handlers: takes no lock."""
        return any(flight.is_running for flight in self._flights)

    def _watch_steps(self) -> None:
        """From now on every step of every optimizer waits for the staging."""
        if self._fence_hook is None:
            engine = weakref.ref(self)

            def fence(*_: Any) -> None:
                if (alive := engine()) is not None:
                    alive.fence()

            self._fence_hook = register_optimizer_step_pre_hook(fence)
            weakref.finalize(self, self._fence_hook.remove)  # a flight keeps its engine alive


def _expected_bytes(models: Iterable[nn.Module], has_optimizer: bool, world_size: int) -> int:
    """What a rank will write, guessed before its optimizer has state: as Adam would have it."""
    tensors = [p for model in models for p in (*model.parameters(), *model.buffers())]
    sharded = sum(local_tensor(t).nbytes for t in tensors if isinstance(t, DTensor))
    whole = sum(t.nbytes for t in tensors if not isinstance(t, DTensor))
    return (sharded + whole // world_size) * (3 if has_optimizer else 1)


def _default_ceiling(control: ControlPlane) -> int:
    """A quarter of the free memory, shared by the ranks of this host: all ranks where the launcher does not tell."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or control.world_size)
    return max(6 * BLOCK, available_bytes() // 4 // ranks)
