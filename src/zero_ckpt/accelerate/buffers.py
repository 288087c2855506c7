"""Gives every rank rank 0's buffers of a sharded model, as DistributedDataParallel does.

FSDP2 leaves buffers alone, so that batch norm statistics drift apart between ranks. DDP gives every rank rank 0's
before each forward pass that follows a pass whose gradients were reduced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zero_ckpt import zero
from zero_ckpt.zero.experts import shared_buffers
from zero_ckpt.zero.sync import reduces_gradients

__all__ = ["share_buffers"]


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
