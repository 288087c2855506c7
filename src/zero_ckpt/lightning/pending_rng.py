"""A restored random stream that waits for the moment at which it takes effect.

In the uninterrupted run the stream had the restored state right after the save, so it must have it again where the
resumed run reaches that point: before the next epoch's iterators are made (which draw from it), or, within an epoch,
between the making of the iterators (whose draws lie in the past) and the next batch. What is drawn between the
iterators and the first batch (by validation loaders that Lightning only skips) was not drawn then, and is undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zero_ckpt.core import rng

__all__ = ["PendingRng"]


class PendingRng:
    """The random stream of one rank. `state`: what `rng.capture` returned there when the checkpoint was written."""

    def __init__(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._state: Mapping[str, Any] | None = state
        self._device = device
        self._leader: object = None  # the first loader; the others draw from the stream after it
        self._at_first_batch: Mapping[str, Any] | None = None
        self._in_epoch = False
        self._started = False
        self._reloaded = False

    @property
    def is_waiting(self) -> bool:
        """Whether the state has not taken effect for good: no batch was asked for."""
        return self._state is not None

    def reload(self) -> None:
        """All loaders are made anew for an epoch that is not begun, as in the uninterrupted run."""
        if not self._reloaded:
            self._reloaded, self._leader = True, None

    def before_iterator(self, loader: object, *, in_epoch: bool) -> None:
        """A training loader makes its iterator; `in_epoch`: to continue an unfinished epoch."""
        is_first = self._leader is None
        self._leader = loader if is_first else self._leader
        self._in_epoch = self._in_epoch or in_epoch
        # Of a loader that was made anew the original made two iterators, too: the second goes on from the first.
        begins = is_first or not self._reloaded
        if not self._in_epoch and loader is self._leader and begins:
            self._apply(self._state)

    def after_iterator(self) -> None:
        """The iterator is made."""
        self._at_first_batch = self._state if self._in_epoch else rng.capture(self._device)

    def at_train_start(self) -> None:
        """Iterators exist, and what is prefetched is prefetched; the first batch comes next."""
        self._started = True
        if self._leader is None:
            self._apply(self._state)
            self._state = None

    def before_fetch(self) -> None:
        """A training loader is asked for a batch."""
        if self._started and self._state is not None:
            self._apply(self._at_first_batch)
            self._state = None

    def _apply(self, state: Mapping[str, Any] | None) -> None:
        if state is not None:
            rng.restore(state, self._device)
