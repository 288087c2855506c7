"""The sync engine, whose saves are committed and durable when they return, and what the async engine takes from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from zero_ckpt.core.alone import group_gone
from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.collector import collector_paused
from zero_ckpt.core.control import (
    DEFAULT_TIMEOUT,
    ControlPlane,
    control_for_process_group,
    process_group_store,
)
from zero_ckpt.core.handle import Committed, SaveHandle
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.core.saving import Captured, ShardPlan
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.transaction import Plans, SaveRequest, Transaction
from zero_ckpt.errors import ConfigurationError

__all__ = ["SyncEngine", "cuda_device"]


class SyncEngine:
    """Saves checkpoints, one at a time: a save is committed and durable when it returns.

    Its extra memory is that of a `StagingPool`: six buffers of 4 MiB. `AsyncEngine` makes the same saves in the
    background, and overrides what differs then: `fence`, `wait`, `after_saves` and `warm` have nothing to do here.
    """

    is_async = False

    def __init__(
        self,
        *,
        storage: Storage | None = None,
        control: ControlPlane | None = None,
    ) -> None:
        self.storage: Storage = storage or AnyStorage()
        self._only_control = control  # for all meetings; None: those of the process group
        self._controls: dict[str, tuple[Any, ControlPlane]] = {}  # name -> (its store, itself)
        self._most_ranks = 1  # that any process group here has had
        self._pool: StagingPool | None = None
        self._plans = Plans()
        if process_group_store() is not None:
            # Makes this rank known, so that its death is seen even before its first save.
            _ = self.control

    @property
    def control(self) -> ControlPlane:
        """The control plane of the current process group, which may be younger than this engine, or made anew."""
        return self._control_named("main")

    def _control_named(self, name: str) -> ControlPlane:
        """A control plane of this name. Meetings on one do not disturb those on another."""
        if self._only_control is not None:
            return self._only_control
        store = process_group_store()
        found = self._controls.get(name)
        if found is None or found[0] is not store:
            found = self._controls[name] = store, control_for_process_group(name)
            self._most_ranks = max(self._most_ranks, found[1].world_size)
        return found[1]

    @collector_paused()
    def save(
        self,
        directory: str | os.PathLike[str],
        tag: str,
        snapshot: Snapshot | Callable[[], Snapshot],
        *,
        step: int,
        zero_stage: int,
        save_latest: bool = True,
        keep_last: int | None = None,
        tag_validation: str = "warn",
        timeout: float | None = None,
    ) -> SaveHandle:
        """Collective: every rank calls it. The sync engine returns when the checkpoint is committed and durable.

        `snapshot` may be a function that makes it: what it raises on one rank is then raised on all. `timeout`: seconds
        of silence after which another rank counts as lost.

        Raises the same error on every rank: `SaveError`, `RankTimeoutError`, `DisagreementError`, `StateMismatchError`
        or `ConfigurationError`. Then nothing was committed, unless the message says otherwise, earlier checkpoints are
        intact, and the next save may succeed. `ConfigurationError` when the process group of earlier calls is gone.
        """
        request = SaveRequest(
            absolute(directory),
            str(tag),
            step,
            zero_stage,
            save_latest,
            keep_last,
            tag_validation,
            DEFAULT_TIMEOUT if timeout is None else timeout,
        )
        if self._most_ranks > 1 and not torch.distributed.is_initialized():
            gone = group_gone("what saves here", self._most_ranks, self.control.world_size)
            raise ConfigurationError(f"{request.directory}: {gone}. Nothing was written.")
        return self._run(request, snapshot)

    def _run(self, request: SaveRequest, snapshot: Snapshot | Callable[[], Snapshot]) -> SaveHandle:
        begin = time.perf_counter()
        transaction = self._transaction(request, self.control)
        transaction.begin(snapshot)
        path, tag = transaction.finish()
        transaction.timings["total"] = time.perf_counter() - begin
        warn_on_first(self.control.rank, transaction.notices)
        return Committed(path, tag, transaction.timings)

    def after_saves(self, action: Callable[[bool], None]) -> None:
        """Do `action(committed)` when the newest save has ended, which here is at once."""
        action(True)

    def fence(self) -> None:
        """Return when live tensors may change: a save has copied them when it returns."""

    def wait(self) -> None:
        """Return at once: a save is committed when it returns."""

    def warm(self, models: Iterable[nn.Module], has_optimizer: bool) -> None:
        """Do nothing: the few buffers are made by the first save."""

    def close(self) -> None:
        """Let go of the buffers. Another save makes new ones."""
        self._pool = None

    def _transaction(self, request: SaveRequest, control: ControlPlane) -> Transaction:
        transaction: Transaction

        def pool_for(shards: list[ShardPlan]) -> StagingPool:
            return self._staging_pool(transaction.captured, shards)

        transaction = Transaction(request, self.storage, control, self._plans, pool_for)
        return transaction

    def _staging_pool(self, captured: Captured, shards: list[ShardPlan]) -> StagingPool:
        device = cuda_device(captured.all_tensors())
        if self._pool is None or self._pool.device != device:
            self._pool = StagingPool(device=device)
        return self._pool


def cuda_device(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """The device of the first tensor that lies on a CUDA device; None when none does."""
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)
