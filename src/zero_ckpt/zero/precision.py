"""Precision names to FSDP2 policies, and a gradient scaler for plain tensors and DTensors together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero.experts import expert_parameters

__all__ = ["ShardedGradScaler", "mixed_precision_policy"]

# Compute dtype of each name; None where stored weights are also what computes.
_COMPUTE_DTYPES: dict[str, torch.dtype | None] = {
    "32-true": None,
    "64-true": None,
    "bf16-true": None,
    "16-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
_ALIASES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def mixed_precision_policy(precision: str | int, *, autocast: bool = True) -> MixedPrecisionPolicy:
    """The FSDP2 policy for a precision by Lightning's name (`"32-true"`, `"bf16-mixed"`, ...).

    Always: parameters are stored, updated and saved in the dtype that the module has, and gradients
    are reduced in it. For mixed precision that is float32.

    `autocast`: the forward pass runs under `torch.autocast`, as Lightning's and Accelerate's do for
    mixed precision. Then parameters are gathered as they are stored, and autocast casts where an
    operation wants it, so that results equal those of DDP. (Low-precision parameters under autocast are
    not the same: a residual stream or a target is rounded, and some operations refuse a float32 input
    with a bfloat16 weight.) Without autocast, mixed precision gathers parameters in the low dtype,
    casts the floating-point inputs of every unit to it, and reduces gradients in float32.

    Raises `ConfigurationError` for another name.
    """
    name = _ALIASES.get(str(precision), str(precision))
    if name not in _COMPUTE_DTYPES:
        raise ConfigurationError(
            f"precision={precision!r} is not supported with ZeRO stages 2 and 3. Choose one of "
            f"{', '.join(map(repr, _COMPUTE_DTYPES))}, or pass a MixedPrecisionPolicy."
        )
    compute = _COMPUTE_DTYPES[name]
    if autocast or compute is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)


class ShardedGradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for optimizers whose gradients are sharded.

    torch's own refuses plain and DTensor gradients in one optimizer. Here every rank unscales its
    own parts, and an inf or NaN found by one rank makes all of them skip the step. `unscale_` and
    `step` are collective over the meshes of the optimizer's parameters.
    """

    @classmethod
    def adopt(cls, scaler: torch.amp.GradScaler) -> ShardedGradScaler:
        """A scaler with the settings and the state of `scaler`, which must not be used any more."""
        if isinstance(scaler, cls):
            return scaler
        adopted = cls.__new__(cls)
        adopted.__dict__.update(scaler.__dict__)
        return adopted

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        found = {found_inf.device: found_inf.clone()}
        for (device, dtype), grads in _local_grads(optimizer).items():
            if dtype is torch.float16 and not allow_fp16:
                raise ValueError("Attempting to unscale FP16 gradients.")
            flag = found.setdefault(device, torch.zeros_like(found_inf, device=device))
            torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, inv_scale.to(device))
        # One verdict for the optimizer: GradScaler sums the flags of all devices.
        verdict = torch.stack([flag.to(found_inf.device) for flag in found.values()]).amax(0)
        for mesh in _meshes(optimizer):
            for dimension in range(mesh.ndim):
                dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=mesh.get_group(dimension))
        return {found_inf.device: verdict}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _local_grads(
    optimizer: torch.optim.Optimizer,
) -> dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for param in _parameters(optimizer):
        grad: Any = param.grad
        if grad is None:
            continue
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        if local.is_sparse:
            if local.dtype is torch.float16:
                param.grad = local = local.coalesce()  # a sum of duplicates may overflow
            local = local._values()
        groups[local.device, local.dtype].append(local)
    return groups


def _meshes(optimizer: torch.optim.Optimizer) -> list[DeviceMesh]:
    """The meshes of all DTensor parameters and experts, in their order, which is the same on every rank."""
    experts = expert_parameters()
    meshes: dict[DeviceMesh, None] = {}
    for parameter in _parameters(optimizer):
        if isinstance(parameter, DTensor):
            meshes[parameter.device_mesh] = None
        if parameter in experts:
            meshes[experts[parameter].mesh] = None
    return list(meshes)
