"""The async ("decoupled") engine: a save returns at once, and is staged, written and committed beside the training.

Weights and optimizer state change in `optimizer.step()` only. So `save` takes references to them, copies at once what
may change before (buffers, client state, gradients), and returns; a thread copies the rest into staging buffers under
the next forward and backward, and the next step of any optimizer waits until it has (the fence). Then it writes and
commits as the sync engine does, over connections of its own: never over the training's process groups.

What goes wrong there is raised at the next save, in `wait`, or in `close`, the same on every rank.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.core.async_save import AsyncSave
from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.control import ControlPlane, meet_json, process_group_store
from zero_ckpt.core.detach import Copies
from zero_ckpt.core.dtensors import local_tensor
from zero_ckpt.core.engine import SyncEngine, cuda_device
from zero_ckpt.core.fence import StepFence
from zero_ckpt.core.flight import Flight
from zero_ckpt.core.handle import SaveHandle, Skipped
from zero_ckpt.core.memory import free_share
from zero_ckpt.core.notices import warn_on_first, warn_user
from zero_ckpt.core.saving import Captured, ShardPlan
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.termination import TerminationGuard
from zero_ckpt.core.threads import start_thread
from zero_ckpt.core.transaction import SaveRequest

__all__ = ["AsyncEngine", "make_engine"]

_logger = logging.getLogger("zero_ckpt")


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
        self._flights: list[Flight] = []  # oldest first, as long as their outcome was not asked for
        self._copies = Copies()
        self._number: tuple[Any, int] | None = None  # (a store, this engine's number over it)
        self._saves = 0  # begun so far
        self._ceiling = 0  # bytes; 0 until it is found
        self._has_said: set[str] = set()
        self._pool_lock = threading.Lock()
        self._fence: StepFence | None = None
        super().__init__(storage=storage, control=control)
        self._guard = TerminationGuard(self._is_busy, self.options.grace)

    def _run(self, request: SaveRequest, snapshot: Snapshot | Callable[[], Snapshot]) -> SaveHandle:
        if not self._make_room(request):
            return Skipped(f"{request.directory}/{request.tag}", request.tag)
        slot = self._saves % self.options.max_in_flight
        transaction = self._transaction(request, self._own_control(str(slot)))
        transaction.begin(snapshot)
        ceiling = self._find_ceiling()
        detached = transaction.detach(self._copies, ceiling, digests=self.options.check_staging)
        flight = Flight(transaction, [f for f in self._flights if not f.done])
        flight.then(lambda _: self._copies.give(detached.copies))
        self._fence = self._fence or StepFence(self)
        with suppress(MemoryError):  # the next save tries again
            self._guard.install()
        self._saves += 1
        self._flights.append(flight)
        flight.start()
        if not detached.fits:
            self._say(
                "at once",
                f"this rank saves {detached.nbytes / 1e9:.2f} GB that may change before the next optimizer step "
                f"(buffers, client state, gradients), and has staging memory for {ceiling / 1e9:.2f} GB: the save "
                "returns when all of it is staged",
            )
            flight.staged()
        return flight

    def fence(self) -> None:
        """Return when all that was saved is staged, so that live tensors may change."""
        for flight in self._flights:
            if flight.is_running:  # in a forked child none is, whatever is not done
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
            if self._fence is not None:
                self._fence.remove()
                self._fence = None
            self._copies, self._ceiling = Copies(), 0
            super().close()

    def warm(self, models: Iterable[nn.Module], has_optimizer: bool) -> None:
        """Make staging memory beside the training, before the first save needs it."""
        models = list(models)
        nbytes = _expected_bytes(models, has_optimizer, self.control.world_size)
        device = cuda_device(p for model in models for p in model.parameters())
        pool, count = self._pool_on(device), self._buffers_for(nbytes)
        thread = threading.Thread(
            target=self._grow, args=(pool, count), name="zero_ckpt-warm", daemon=True
        )
        with suppress(MemoryError):  # the save will find out whether there is enough for it
            start_thread(thread)

    def _make_room(self, request: SaveRequest) -> bool:
        """Wait for earlier saves, or give them up, as `when_busy` says; False when this save is to be skipped.

        Raises what earlier saves failed with. Every rank does the same.
        """
        is_busy, ended = self._look_around(request.timeout)
        if is_busy and self.options.when_busy == "skip":
            self._settle(ended)
            return False
        if is_busy and self.options.when_busy == "replace":
            for flight in self._flights:
                flight.give_up()
            ended = len(self._flights)
        self._settle(max(ended, len(self._flights) - self.options.max_in_flight + 1))
        return True

    def _look_around(self, timeout: float) -> tuple[bool, int]:
        """Whether `max_in_flight` saves are under way on some rank; and how many saves to settle, oldest first.

        That is up to the newest that failed on some rank, since all ranks are to raise the same.
        """
        if self.options.when_busy == "wait" and self.options.max_in_flight == 1:
            return True, 0  # nothing to agree upon: it waits for the only one
        first = self._saves - len(self._flights)
        failed = [n for n, each in enumerate(self._flights, first + 1) if each.done and each.error]
        is_busy = sum(not each.done for each in self._flights) >= self.options.max_in_flight
        answer = meet_json(
            self._own_control("busy"),
            "save: busy",
            [is_busy, max(failed, default=0)],
            lambda ranks: [any(busy for busy, _ in ranks), max(number for _, number in ranks)],
            timeout,
        )
        return bool(answer[0]), max(0, answer[1] - first)

    def _own_control(self, name: str) -> ControlPlane:
        """A control plane on which this engine meets its counterparts on other ranks, and no other engine."""
        store = process_group_store()
        if self._number is None or self._number[0] is not store:
            self._number = store, _next_number(store)
        return self._control_named(f"async-{self._number[1]}-{name}")

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
        failed = [flight for flight in untold if not flight.is_given_up]
        others = [f"{flight.path} was not saved, either: {flight.error}" for flight in failed[1:]]
        warn_on_first(self.control.rank, [*notices, *given_up, *others])
        for text in (text for flight in settled for text in flight.mishaps):
            warn_user(text)
        if failed:
            failed[0].wait()

    def _staging_pool(self, captured: Captured, shards: list[ShardPlan]) -> StagingPool:
        nbytes, ceiling = sum(s.layout.nbytes for s in shards), self._find_ceiling()
        if nbytes > ceiling:
            self._say(
                "in pieces",
                f"this rank saves {nbytes / 1e9:.2f} GB and has staging memory for {ceiling / 1e9:.2f} GB: the "
                "optimizer step after a save waits until the disk has taken the difference",
            )
        pool = self._pool_on(cuda_device(captured.all_tensors()))
        pool.grow(self._buffers_for(nbytes))
        return pool

    def _pool_on(self, device: torch.device | None) -> StagingPool:
        """The pool, new and empty where there is none for `device`."""
        with self._pool_lock:
            if self._pool is None or self._pool.device != device:
                self._pool = StagingPool(0, device)
            return self._pool

    def _buffers_for(self, nbytes: int) -> int:
        """How many a save of `nbytes` takes, as far as there is memory for them."""
        wanted = -(-nbytes // BLOCK) + 6  # each file's header and tail take a buffer, too
        return min(wanted * self.options.max_in_flight, self._find_ceiling() // BLOCK)

    def _grow(self, pool: StagingPool, count: int) -> None:
        """Have `count` buffers in `pool`, or as many as there are when `close` lets go of it."""
        with suppress(MemoryError):  # as in `warm`
            while pool is self._pool and pool.count < count:
                pool.grow(pool.count + 1)

    def _find_ceiling(self) -> int:
        """Bytes of staging memory that this rank may have. Found once, before it takes any."""
        with self._pool_lock:
            if not self._ceiling:
                self._ceiling = self.options.staging_bytes or max(
                    6 * BLOCK, free_share(self.control.world_size)
                )
            return self._ceiling

    def _say(self, what: str, text: str) -> None:
        """Once for each kind of text, on rank 0."""
        if what not in self._has_said and self.control.rank == 0:
            _logger.warning("%s. AsyncSave(staging_bytes=...) allows more.", text)
        self._has_said.add(what)

    def _is_busy(self) -> bool:
        """For signal handlers: takes no lock."""
        return any(flight.is_running for flight in self._flights)


_numbered: tuple[Any, int] = None, 0
"""The store of a process group, and how many engines have saved over it."""


def _next_number(store: Any) -> int:
    """Engines are numbered by their first saves, whose order is the same on every rank."""
    global _numbered
    known, count = _numbered
    _numbered = store, count + 1 if store is known else 1
    return _numbered[1]


def _expected_bytes(models: Iterable[nn.Module], has_optimizer: bool, world_size: int) -> int:
    """What a rank will write, guessed before its optimizer has state: as Adam would have it."""
    tensors = [p for model in models for p in (*model.parameters(), *model.buffers())]
    sharded = sum(local_tensor(t).nbytes for t in tensors if isinstance(t, DTensor))
    whole = sum(t.nbytes for t in tensors if not isinstance(t, DTensor))
    return (sharded + whole // world_size) * (3 if has_optimizer else 1)
