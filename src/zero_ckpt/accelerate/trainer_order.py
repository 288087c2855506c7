"""The order of a Trainer's epochs, where it comes from generators that go on from one epoch to the next.

The Trainer finds its place by counting steps, and its own sampler makes the order of an epoch of a seed and the epoch's
number. Without that one (`use_seedable_sampler=False`) the order is drawn from torch's global generator, or from one
that Accelerate has given the sampler, neither of which a resumed epoch finds as it was when the epoch began. Here each
rank keeps both as they were then.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, ClassVar

import torch

from zero_ckpt.core import rng
from zero_ckpt.core.shapes import Shape

__all__ = ["EpochOrder"]


class EpochOrder:
    """What the running epoch's order was drawn from, or will be after a load."""

    SHAPE: ClassVar[Shape] = {
        "epoch": int,
        "global": rng.check_generator,
        "sampler": (torch.Tensor, NoneType),
        "sampler_now": (torch.Tensor, NoneType),
    }
    """Of what `state` returns."""

    def __init__(self) -> None:
        self._epoch = -1
        self._global = torch.empty(0, dtype=torch.uint8)
        self._sampler: torch.Tensor | None = None
        self._live: torch.Generator | None = None
        self._loaded: Mapping[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Tensors and plain values to store. Before the first epoch, what was loaded."""
        if self._loaded is not None:
            return dict(self._loaded)
        now = None if self._live is None else self._live.get_state()
        return {
            "epoch": self._epoch,
            "global": self._global,
            "sampler": self._sampler,
            "sampler_now": now,
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Let the next epoch go on from what `state` gave; None for a checkpoint without."""
        self._loaded = state

    def begin(self, epoch: int, loader: Any) -> None:
        """Before `loader` is iterated for an epoch; in the first one after a load the generators are put back."""
        loaded, self._loaded = self._loaded, None
        live: torch.Generator | None = getattr(loader, "synchronized_generator", None)
        if loaded is not None:
            is_begun = loaded["epoch"] == epoch
            own = loaded["sampler" if is_begun else "sampler_now"]
            if live is not None and own is not None:
                live.set_state(own)
            if is_begun:
                torch.set_rng_state(loaded["global"])  # the Trainer puts back its own after it
        self._epoch, self._global, self._live = epoch, torch.get_rng_state(), live
        self._sampler = None if live is None else live.get_state()
