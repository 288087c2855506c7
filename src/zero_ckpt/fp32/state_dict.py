"""The full state dict of a sharded checkpoint, in this process's memory or on demand."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zero_ckpt.core.checkpoint import Checkpoint, open_checkpoint
from zero_ckpt.core.chunks import Box
from zero_ckpt.core.dtensors import TORCH_DTYPES
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.objects import OBJECTS
from zero_ckpt.core.reader import Request
from zero_ckpt.core.tag_folder import was_replaced
from zero_ckpt.errors import CorruptCheckpointError, UnsafeObjectError
from zero_ckpt.fp32.selection import OutTensor, select

__all__ = [
    "extra_state",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | int | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
    *,
    weights_only: bool = True,
) -> dict[str, torch.Tensor]:
    """The model's full state dict on the CPU, for `load_state_dict(strict=True)` of a model that is not sharded.

    Parameters in fp16, bf16 or fp8 become fp32; fp32 and fp64 ones, integers and buffers are bitwise what was saved.
    Tied names share one tensor. Frozen parameters are included, unless this call or the save has excluded them.
    What modules' `get_extra_state` returned is included too. Files of optimizer state are not opened.

    `checkpoint_dir`: a checkpoint directory or a tag's folder. `tag` None: what `latest` names, or, when that is
    damaged, the newest checkpoint that is whole, with a warning. `lazy_mode`: tensors know their shape and dtype, take
    no memory, and are read when they are used (an index of integers and slices reads only its bytes); `.contiguous()`
    gives a tensor of its own each time. The files must stay.
    `weights_only=False` allows pickled extra state, whose opening can run code.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `FormatVersionError` or `UnsafeObjectError`.
    """
    while True:
        with open_checkpoint(checkpoint_dir, None if tag is None else str(tag)) as checkpoint:
            try:
                return _state_dict(checkpoint, exclude_frozen_parameters, lazy_mode, weights_only)
            except CorruptCheckpointError:
                if not was_replaced(checkpoint.storage, checkpoint.path, checkpoint.manifest):
                    raise


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | int | None = None
) -> nn.Module:
    """Load the full state dict into `model`, strictly, one tensor at a time, and return the model.

    Parameters keep the model's dtype. Raises as `get_fp32_state_dict_from_zero_checkpoint` and `load_state_dict` do.
    """
    model.load_state_dict(
        get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, lazy_mode=True)
    )
    return model


def _state_dict(
    checkpoint: Checkpoint, exclude_frozen: bool, lazy_mode: bool, weights_only: bool
) -> dict[str, Any]:
    chosen = select(checkpoint.manifest, exclude_frozen_parameters=exclude_frozen)
    tensors = _lazy(checkpoint, chosen) if lazy_mode else _eager(checkpoint, chosen)
    state_dict = {
        name: value for tensor, value in zip(chosen, tensors, strict=True) for name in tensor.names
    }
    return state_dict | extra_state(checkpoint, weights_only)


def _eager(checkpoint: Checkpoint, chosen: Sequence[OutTensor]) -> list[torch.Tensor]:
    tensors = [
        torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="cpu")
        for tensor in chosen
    ]
    checkpoint.read(
        [
            checkpoint.request(tensor.role, tensor.key, target)
            for tensor, target in zip(chosen, tensors, strict=True)
        ]
    )
    return tensors


def _lazy(checkpoint: Checkpoint, chosen: Sequence[OutTensor]) -> list[torch.Tensor]:
    # The tensors open files again when they are used; those are closed once no tensor is left.
    weakref.finalize(checkpoint, checkpoint.shards.close)
    return [_lazy_tensor(checkpoint, tensor) for tensor in chosen]


def _lazy_tensor(checkpoint: Checkpoint, tensor: OutTensor) -> LazyTensor:
    dtype = TORCH_DTYPES[tensor.dtype]

    def fill(box: Box, target: torch.Tensor) -> None:
        checkpoint.read([Request(tensor.role, tensor.key, tensor.placed, box, target)])

    def read(box: Box) -> torch.Tensor:
        target = torch.empty(box.shape, dtype=dtype, device="cpu")
        fill(box, target)
        return target

    lazy = LazyTensor(tensor.role, tensor.key, tensor.shape, dtype, read)
    lazy.fill = fill
    return lazy


def extra_state(checkpoint: Checkpoint, weights_only: bool) -> dict[str, Any]:
    """What modules' `get_extra_state` returned, by key. Raises `UnsafeObjectError` for a pickled value."""
    tree = json.loads(checkpoint.shards.get("state", 0).read_entry(f"{OBJECTS}.json"))
    if not isinstance(tree, dict) or not tree.get("extra_state"):
        return {}
    try:
        found: dict[str, Any] = checkpoint.objects(weights_only)["extra_state"]
    except UnsafeObjectError as error:
        raise UnsafeObjectError(
            f"{error} (the model has extra state, which is stored beside it)"
        ) from error
    return found
