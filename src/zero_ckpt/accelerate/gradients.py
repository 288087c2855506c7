"""Gradients of an accumulation window that is not complete.

Within `accelerator.accumulate()`, gradients of the batches so far lie on each rank, and Accelerate alone loses them:
after a resume the window's step is made of what is left of it. Here each rank stores its own, and gets them back where
it holds the same parts again. At another world size the window begins anew, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zero_ckpt.accelerate.base import ZeroBase
from zero_ckpt.core.binding import bound_names
from zero_ckpt.zero import accumulated

__all__ = ["capture_gradients", "gradients_fit", "restore_gradients"]


def capture_gradients(accelerator: ZeroBase) -> dict[str, torch.Tensor]:
    """Name -> what this rank has accumulated; empty outside of a window. References, not copies.

    Sharded models must be in their sharded state, as `capture_models` leaves them.
    """
    if accelerator.gradient_state.sync_gradients:
        return {}
    models = accelerator.zero_models()
    return accumulated.accumulated_gradients(models.values(), bound_names(models))


def gradients_fit(accelerator: ZeroBase, gradients: Mapping[str, torch.Tensor]) -> bool:
    """Whether every one of these gradients has its place in the prepared models."""
    models = accelerator.zero_models()
    return accumulated.gradients_fit(models.values(), bound_names(models), gradients)


def restore_gradients(accelerator: ZeroBase, gradients: Mapping[str, torch.Tensor]) -> None:
    """Continue the window with these gradients, which fit; without any, no window is open.

    Accelerate learns of the window only from its next batch, and a save before that would take it to be closed.
    """
    accelerator.gradient_state.sync_gradients = not gradients
    models = accelerator.zero_models()
    accumulated.put_gradients(models.values(), bound_names(models), gradients)
