"""Gradients of an accumulation window that is not complete.

Within `accelerator.accumulate()`, gradients of the batches so far lie on each rank, not yet averaged, and Accelerate's
own checkpoints lose them: after a resume the window's step is made of what is left of it. Here each rank stores its
own, and gets them back at the same world size; so the window goes on as if never interrupted. At another world size
they have no place: the window begins anew, with a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from zero_ckpt.accelerate.base import ZeroBase
from zero_ckpt.core.binding import bound_names

__all__ = ["capture_gradients", "in_window", "restore_gradients"]


def in_window(accelerator: ZeroBase) -> bool:
    """Whether gradients are being accumulated, and the optimizer step that uses them is to come."""
    return not accelerator.gradient_state.sync_gradients


def capture_gradients(accelerator: ZeroBase) -> dict[str, torch.Tensor]:
    """FQN -> what this rank has accumulated; empty outside of a window. References, not copies."""
    if not in_window(accelerator):
        return {}
    names = bound_names(accelerator.zero_models())
    found: dict[str, torch.Tensor] = {}
    for model in accelerator.zero_models().values():
        unsharded = {id(sharded): part for sharded, part in _sharded(model)}
        for parameter in model.parameters():
            part = unsharded.get(id(parameter))
            gradient = parameter.grad if part is None else _accumulated(part)
            if gradient is not None:
                found[names[id(parameter)]] = gradient.detach()
    return found


def restore_gradients(accelerator: ZeroBase, gradients: Mapping[str, torch.Tensor]) -> None:
    """Continue the window with these gradients; without any, there is none."""
    names = bound_names(accelerator.zero_models())
    for model in accelerator.zero_models().values():
        unsharded = {id(sharded): part for sharded, part in _sharded(model)}
        for parameter in model.parameters():
            stored = gradients.get(names[id(parameter)])
            part = unsharded.get(id(parameter))
            if part is not None:
                _put(part, stored)
            else:
                parameter.grad = None if stored is None else stored.to(parameter.device)


def _sharded(model: nn.Module) -> Iterator[tuple[nn.Parameter, Any]]:
    """(sharded parameter, FSDP2's record of it) of everything that FSDP2 shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _groups(module):
                for record in group.fsdp_params:
                    yield record.sharded_param, record


def _groups(module: FSDPModule) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13 has several for a module
    if groups is not None:
        return list(groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _accumulated(record: Any) -> torch.Tensor | None:
    """What passes without communication have left: whole, and of this rank only."""
    kept: torch.Tensor | None = record.unsharded_accumulated_grad
    if kept is None and hasattr(record, "_unsharded_param"):
        kept = record._unsharded_param.grad
    return _local(kept)


def _local(tensor: Any) -> torch.Tensor | None:
    local = getattr(tensor, "_local_tensor", tensor)
    return None if local is None else local.detach()


def _put(record: Any, stored: torch.Tensor | None) -> None:
    if hasattr(record, "_unsharded_param"):
        record._unsharded_param.grad = None
    record.unsharded_accumulated_grad = (
        None if stored is None else stored.to(record.sharded_param.device)
    )
    record.sharded_param.grad = None
