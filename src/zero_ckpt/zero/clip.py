"""Gradient clipping where plain tensors and DTensors on any meshes mix.

A plain gradient is whole and the same on every rank; a DTensor's is spread over the mesh dimensions on which it is
sharded and repeated over the others. Along their mesh dimension ranks have different declared experts, which count like
parts of one tensor. Norms are taken in float32 at least and summed in float64, so a narrow dtype does not overflow.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero.experts import expert_parameters
from zero_ckpt.zero.initial import mesh_device

__all__ = ["clip_grad_norm_", "clip_grad_value_"]

Spread = tuple[tuple[DeviceMesh, int], ...]  # the dimensions of meshes that hold different parts


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale gradients in place so that their joint `norm_type`-norm is at most `max_norm`.

    Collective over the meshes of the parameters: every rank passes the same parameters (a rank
    without a gradient for one of them contributes zero). Equals `torch.nn.utils.clip_grad_norm_`
    on the unsharded gradients, and like it scales by `max_norm / (norm + 1e-6)` when that is below
    one.

    Returns the norm before clipping, a plain 0-d float32 tensor, the same on every rank. Raises RuntimeError on every
    rank, and changes nothing, when it is not finite and `error_if_nonfinite`; `ConfigurationError` for a `norm_type`
    that is not above 0, and for gradients whose reduction is still pending.
    """
    if not norm_type > 0:
        raise ConfigurationError(f"norm_type must be positive or inf, not {norm_type}.")
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    total = _total_norm(params, float(norm_type))
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"The total norm of order {norm_type} of gradients is {total.item()}, so they cannot "
            "be clipped. Pass error_if_nonfinite=False to clip anyway."
        )
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grads in _by_device_and_dtype(_local_grads(params)):
        # Multiplying by 1 costs less than asking the device whether to. The factor is not rounded to
        # a narrow dtype, but is of the gradients' dtype otherwise, for which there is one kernel.
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        torch._foreach_mul_(grads, scale.to(grads[0].device, wide))
    return total.to(torch.float32)


@torch.no_grad()
def clip_grad_value_(parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float) -> None:
    """Clamp every gradient element to `[-clip_value, clip_value]`, in place. No communication.

    Raises `ConfigurationError` for gradients whose reduction is still pending.
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for grads in _by_device_and_dtype(_local_grads(params)):
        torch._foreach_clamp_min_(grads, -float(clip_value))
        torch._foreach_clamp_max_(grads, float(clip_value))


def _total_norm(params: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    device = _reduction_device(params)
    whole = torch.zeros((), dtype=torch.float64, device=device)
    for spread, members in _by_spread(params).items():
        part = _local_power(_local_grads(members), norm_type, device)
        _reduce(part, spread, norm_type)
        whole = torch.maximum(whole, part) if math.isinf(norm_type) else whole + part
    return whole if math.isinf(norm_type) else whole ** (1.0 / norm_type)


def _by_spread(params: list[torch.Tensor]) -> dict[Spread, list[torch.Tensor]]:
    """Parameters by the mesh dimensions that their gradients are spread over; (): whole on every rank.

    Grouped by parameter and not by gradient, so that ranks agree on the collectives to come even
    when some of them lack a gradient.
    """
    groups: dict[Spread, list[torch.Tensor]] = defaultdict(list)
    experts = expert_parameters()
    for param in params:
        place = experts.get(param)
        apart: Spread = () if place is None else ((place.mesh, place.dim),)
        groups[_spread(param) + apart].append(param)
    return dict(groups)


def _spread(tensor: torch.Tensor) -> Spread:
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple((mesh, i) for i, p in enumerate(tensor.placements) if not isinstance(p, Replicate))


def _local_power(grads: list[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    """Sum of |x|**norm_type over this rank's elements (their maximum for inf): 0-d float64."""
    parts = [torch.zeros(1, dtype=torch.float64, device=device)]
    for group in _by_device_and_dtype(grads):
        wide = torch.promote_types(group[0].dtype, torch.float32)
        norms = torch._foreach_norm(group, norm_type, dtype=wide)
        parts.append(torch.stack(norms).to(device, torch.float64))
    norm = torch.cat(parts)
    return norm.max() if math.isinf(norm_type) else (norm**norm_type).sum()


def _reduce(part: torch.Tensor, spread: Spread, norm_type: float) -> None:
    operation = dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM
    for mesh, dimension in spread:
        dist.all_reduce(part, op=operation, group=mesh.get_group(dimension))


def _reduction_device(params: list[torch.Tensor]) -> torch.device:
    """The device on which norms are reduced: the accelerator even for gradients that are offloaded to the CPU."""
    devices = {mesh_device(p.device_mesh) for p in params if isinstance(p, DTensor)}
    devices |= {p.grad.device for p in params if p.grad is not None}
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _local_grads(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's part of every gradient that is there and not empty; shares memory with it."""
    grads = []
    for param in params:
        grad = param.grad
        if isinstance(grad, DTensor):
            if any(isinstance(p, Partial) for p in grad.placements):
                raise ConfigurationError(
                    f"A gradient of shape {tuple(grad.shape)} has a pending reduction "
                    f"(placements {grad.placements}). Clip after the backward pass that "
                    "synchronizes gradients."
                )
            grad = grad.to_local()
        if grad is not None and grad.numel():
            grads.append(grad)
    return grads


def _by_device_and_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device, tensor.dtype].append(tensor)
    return list(groups.values())
