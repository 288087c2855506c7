"""Whole tensors, which every rank has, as this rank's part of sharded ones. No communication."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

__all__ = ["part_like", "placed_like"]


def part_like(whole: torch.Tensor, like: DTensor) -> DTensor:
    """This rank's part of `whole`, sharded like `like` and on its device; both have the same shape."""
    whole = whole.detach().to(like.to_local().device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def placed_like(value: Any, parameter: torch.Tensor) -> Any:
    """A value of a parameter's state: sharded like the parameter if it has its shape, else replicated on its mesh.

    Numbers, 0-d tensors and DTensors stay as they are, and so does any value when the parameter is not sharded.
    """
    if (
        not isinstance(parameter, DTensor)
        or not isinstance(value, torch.Tensor)
        or isinstance(value, DTensor)
        or value.ndim == 0
    ):
        return value
    if value.shape == parameter.shape:
        return part_like(value, parameter)
    mesh = parameter.device_mesh
    value = value.detach().to(parameter.to_local().device)
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
