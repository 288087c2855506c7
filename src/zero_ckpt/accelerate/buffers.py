"""Gives every rank rank 0's buffers of a sharded model, as DistributedDataParallel does.

FSDP2 leaves buffers alone, so that batch norm statistics drift apart between ranks. DDP gives every rank rank 0's
before each forward pass that follows a pass whose gradients were reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zero_ckpt import zero
from zero_ckpt.core.computed import set_computed
from zero_ckpt.core.state import capture_models
from zero_ckpt.zero.experts import shared_buffers
from zero_ckpt.zero.sync import reduces_gradients

__all__ = ["restore_buffers", "share_buffers"]


def share_buffers(model: nn.Module, mesh: DeviceMesh) -> None:
    """From now on, broadcast buffers before forward passes of `model`, which become collective over `mesh`."""
    is_due = True

    def before(module: nn.Module, *_: Any) -> None:
        nonlocal is_due
        buffers = shared_buffers(module)
        if is_due and buffers:
            zero.broadcast_from_first(buffers, mesh)
        is_due = torch.is_grad_enabled() and reduces_gradients(model)

    model.register_forward_pre_hook(before, prepend=True)


def restore_buffers(models: Mapping[str, nn.Module], buffers: Mapping[str, torch.Tensor]) -> None:
    """Give this rank's buffers back to it, by their names in the checkpoint."""
    if not buffers:
        return
    state = capture_models(models)
    for key in (buffers.keys() & state.tensors.keys()) - state.computed:
        state.tensors[key].detach().copy_(buffers[key])
    computed = {key: buffers[key] for key in buffers.keys() & state.computed}
    set_computed(models, computed, state.aliases)
