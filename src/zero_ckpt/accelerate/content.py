"""What an accelerator's checkpoint holds, beside the weights and the optimizers' state.

Laid out like a checkpoint of `zero_ckpt.Checkpointer` or of the Lightning strategy, so that each opens the others': the
objects `optimizers`, `lr_schedulers`, `extra_state`, `global_step` and `client_state`; and what only Accelerate has, in
the object `accelerate`:

    step, iteration         Accelerate's counters of batches and of saves
    num_processes           of the job, and gradient_accumulation_steps
    custom                  state of the objects that were registered for checkpointing, in their order
    scaler                  state of the gradient scaler, or None

Each rank stores for itself `rng`, `dataloaders` (see `data`), `gradients` (see `gradients`), and its `buffers` where
they may differ from rank 0's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zero_ckpt.accelerate import data
from zero_ckpt.accelerate.base import ZeroBase
from zero_ckpt.accelerate.gradients import capture_gradients
from zero_ckpt.accelerate.hooks import Edits, apply_edits
from zero_ckpt.core import rng
from zero_ckpt.core.binding import bound_names, snapshot_of
from zero_ckpt.core.per_rank import CLIENT_STATE
from zero_ckpt.core.shapes import Shape
from zero_ckpt.core.state import ModelState, Snapshot, capture_models

__all__ = ["ENTRY", "RANK_PARTS", "make_snapshot"]

ENTRY = "accelerate"
"""Name of the object that only Accelerate has."""

RANK_PARTS: dict[str, Shape] = {
    "rng": rng.check,
    "dataloaders": data.LOADERS,
    "gradients": {str: torch.Tensor},
    "buffers": {str: torch.Tensor},
}
"""What each rank stores for itself."""


def make_snapshot(
    accelerator: ZeroBase,
    edits: Edits,
    values: Mapping[str, torch.Tensor],
    client_state: Any,
    *,
    per_rank_client_state: Any = None,
    exclude_frozen: bool = False,
) -> Snapshot:
    """This rank's references to live state. `edits`, `values`: what hooks made of the weights."""
    models = accelerator.zero_models()
    kept = {name: model for name, model in models.items() if name not in edits.removed}
    state = capture_models(kept)
    apply_edits(state, edits, values, accelerator.zero_control.rank)
    snapshot = snapshot_of(
        state,
        bound_names(models),
        accelerator.zero_optimizers(),
        accelerator.zero_schedulers(),
        step=accelerator._zero_step,
        client_state=client_state,
        exclude_frozen=exclude_frozen,
    )
    snapshot.objects[ENTRY] = _own(accelerator)
    snapshot.rank_objects = {
        "rng": rng.capture(accelerator.zero_device()),
        "dataloaders": data.capture_loaders(accelerator),
        "gradients": capture_gradients(accelerator),
        "buffers": _own_buffers(accelerator, state),
    }
    if per_rank_client_state is not None:
        snapshot.rank_objects[CLIENT_STATE] = per_rank_client_state
    return snapshot


def _own_buffers(accelerator: ZeroBase, state: ModelState) -> dict[str, torch.Tensor]:
    """This rank's buffers where they may differ between ranks; rank 0's are stored among the weights."""
    if accelerator.zero_shares_buffers or accelerator.process_index == 0:
        return {}
    return {key: state.tensors[key].detach() for key in sorted(state.buffers)}


def _own(accelerator: ZeroBase) -> dict[str, Any]:
    scaler = accelerator.scaler
    return {
        "step": accelerator.step,
        "iteration": accelerator.save_iteration,
        "num_processes": accelerator.num_processes,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "custom": [each.state_dict() for each in accelerator._custom_objects],
        "scaler": None if scaler is None else scaler.state_dict(),
    }
