"""Stages 2 and 3: shard a module in place with FSDP2, unit by unit.

What FSDP2 cannot shard stays whole on every rank, with averaged gradients: scalars, empty
parameters, integers, and trainable parameters of another dtype than most of their unit.

Declared experts are units of their own, sharded over the ranks that have the same experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from zero_ckpt.core.naming import dotted
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero.dropped import recover_from_failures
from zero_ckpt.zero.expert_calls import require_every_call
from zero_ckpt.zero.expert_gradients import divide_gradients
from zero_ckpt.zero.experts import attach_experts, expert_lists, mesh_of_experts
from zero_ckpt.zero.gathered import keep_gathered
from zero_ckpt.zero.generic import allow_generic, users_class
from zero_ckpt.zero.initial import (
    broadcast_from_first,
    materialize,
    mesh_device,
    require_initializers,
)
from zero_ckpt.zero.inside import outermost_units, settle
from zero_ckpt.zero.sync import average_gradients_of
from zero_ckpt.zero.wrap import Root, WrapPolicy, resolve_units

__all__ = ["Sharding", "shard_module"]


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a module was sharded.

    `units`: paths of what is gathered together, innermost first; "" is the root. `replicated`: paths of parameters that
    every rank that has them holds whole. `replaced`: the parameter before -> the parameter in its place, for as long as
    the one before is alive.
    """

    stage: int
    root: Root
    units: tuple[str, ...]
    replicated: tuple[str, ...]
    replaced: WeakTensorKeyDictionary = field(repr=False, compare=False)


_shardings: WeakKeyDictionary[nn.Module, Sharding] = WeakKeyDictionary()


def shard_module(
    module: nn.Module,
    *,
    stage: int,
    mesh: DeviceMesh,
    wrap: WrapPolicy = "auto",
    mixed_precision: MixedPrecisionPolicy | None = None,
    cpu_offload: bool = False,
    root: Root = "shard",
) -> Sharding:
    """Shard `module` in place at ZeRO stage 2 or 3. Collective over `mesh`.

    `mesh`: one dimension, or two for hybrid sharding (see `make_mesh`). `wrap`: see `resolve_units`; where the model
    already has units of its own (`fully_shard` was called on submodules), those are kept and `wrap` is not used.
    `mixed_precision`: see `mixed_precision_policy`; None computes in the stored dtype. `cpu_offload`: parameters,
    gradients and optimizer state live in host memory; on a CPU mesh they do anyway.

    `root="shard"`: all parameters are sharded; those outside the units belong to the root's own group, which is whole
    whenever the root's forward and its backward run: `module` must then be used by calling it, and every backward pass
    must go through its output. `root="replicate"`: parameters outside the units stay plain and whole on every rank,
    with averaged gradients, so that `module` may be used in any way, with several backward passes per step (a GAN under
    manual optimization).

    On return parameters are new objects (DTensors) under the same names, hold what rank 0 held, and no tensor is on the
    meta device. Calling again with the same stage and root changes nothing.

    Where several ranks have the same declared experts, each of these must be called in every forward pass of `module`,
    with an empty input when it got no token; else that pass raises.

    Raises `ConfigurationError` for a wrong stage, a module that another engine has wrapped or that is sharded at
    another stage, an uninitialized lazy module, or meta modules that nothing can initialize.
    """
    known = _shardings.get(module)
    if known is None:
        _validate(module, stage, root)
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": mixed_precision or MixedPrecisionPolicy(),
        }
        if cpu_offload and mesh.device_type != "cpu":
            options["offload_policy"] = CPUOffloadPolicy()
        known = _shardings[module] = _shard(
            module, stage, root, _units(module, wrap, root), options
        )
    elif (known.stage, known.root) != (stage, root):
        raise ConfigurationError(
            f"{users_class(type(module)).__name__} is already sharded with stage={known.stage}, "
            f"root={known.root!r}; it cannot become stage={stage}, root={root!r}. "
            "Shard a fresh model."
        )
    return known


def _validate(module: nn.Module, stage: int, root: str) -> None:
    if stage not in (2, 3):
        raise ConfigurationError(
            f"shard_module() is for stages 2 and 3, not {stage}. Stages 0 and 1 wrap the model in "
            "DistributedDataParallel; stage 1 adds partition_optimizer()."
        )
    if root not in ("shard", "replicate"):
        raise ConfigurationError(f"root={root!r}: expected 'shard' or 'replicate'.")
    for name, submodule in module.named_modules():
        if isinstance(submodule, (DistributedDataParallel, FullyShardedDataParallel)):
            raise ConfigurationError(
                f"{name or '(root)'} is already wrapped in {type(submodule).__name__}. "
                f"Give shard_module() the module inside it."
            )
    _refuse_embeddings(module)
    lazy = [n for n, p in module.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ConfigurationError(
            f"Parameters of lazy modules have no shape yet: {', '.join(lazy)}. Run the model once "
            "on an example input before it is sharded."
        )
    require_initializers(module)


def _refuse_embeddings(module: nn.Module) -> None:
    """FSDP2 cannot reduce sparse gradients, and loses what a forward pass writes into a gathered weight."""
    for name, part in module.named_modules():
        if not isinstance(part, (nn.Embedding, nn.EmbeddingBag)) or not part.weight.requires_grad:
            continue
        for option, found in (("sparse", part.sparse), ("max_norm", part.max_norm)):
            if found:
                raise ConfigurationError(
                    f"{name or '(root)'} is an {type(part).__name__} with {option}={found}, which stages 2 and 3 "
                    "cannot train: its gradients are sparse, or its forward pass changes the weight. Use stage 0 or "
                    f"1, or leave out {option}."
                )


def _units(module: nn.Module, wrap: WrapPolicy, root: Root) -> dict[str, nn.Module]:
    """The modules to call `fully_shard` on, by path, in this order."""
    experts = _experts(module)
    units = {path: e for path, e in experts.items() if not isinstance(e, FSDPModule)}
    if not any(isinstance(m, FSDPModule) for m in module.modules()):
        units |= _outside(resolve_units(module, wrap, root=root), experts)
    if root == "shard" and not isinstance(module, FSDPModule):
        units[""] = module
    return units


def _experts(module: nn.Module) -> dict[str, nn.Module]:
    """Every declared expert under `module`, by its path."""
    return {
        f"{dotted(path)}{index}": expert
        for path, experts in expert_lists(module).items()
        for index, expert in enumerate(experts)
    }


def _outside(units: dict[str, nn.Module], experts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The units that are no part of an expert."""
    within = {part for expert in experts.values() for part in expert.modules()}
    return {path: unit for path, unit in units.items() if unit not in within}


def _shard(
    module: nn.Module,
    stage: int,
    root: Root,
    units: dict[str, nn.Module],
    options: dict[str, Any],
) -> Sharding:
    mesh: DeviceMesh = options["mesh"]
    places = {e: mesh_of_experts(each) for each in expert_lists(module).values() for e in each}
    replaced = WeakTensorKeyDictionary()
    whole: set[nn.Parameter] = set()
    for own in [m for m in module.modules() if isinstance(m, FSDPModule)]:
        materialize(module, _members(own), mesh_device(mesh))
    for unit in units.values():
        kept_gathered = unit is module or (stage == 2 and root == "shard")
        place = places.get(unit)
        if place is None:
            whole |= _shard_unit(module, unit, kept_gathered, options, replaced)
        else:
            # What stays whole of an expert, `attach_experts` averages where the expert is.
            _shard_unit(module, unit, kept_gathered, {**options, "mesh": place.replicas}, replaced)
            divide_gradients(unit, place.parts)
    if root == "replicate":
        members = _members(module)
        with _tracking(members, replaced):
            whole.update(_start(module, members, mesh))
    require_every_call(module, expert_lists(module))
    attach_experts(module)
    names = {p: name for name, p in module.named_parameters() if p in whole}
    average_gradients_of(module, list(names), mesh)
    for outermost in outermost_units(module):
        settle(outermost)
        recover_from_failures(outermost)
    return Sharding(stage, root, tuple(units), tuple(names.values()), replaced)


def _shard_unit(
    root: nn.Module,
    unit: nn.Module,
    kept_gathered: bool,
    options: dict[str, Any],
    replaced: WeakTensorKeyDictionary,
) -> set[nn.Parameter]:
    """Shard one unit under `root`; returns the parameters that stay whole."""
    members = _members(unit)
    with _tracking(members, replaced):
        parameters = _start(root, members, options["mesh"])
        whole = _unshardable(parameters)
        allow_generic(unit)
        fully_shard(unit, reshard_after_forward=not kept_gathered, ignored_params=whole, **options)
    if kept_gathered:
        keep_gathered(unit)
    return whole


def _members(unit: nn.Module) -> list[nn.Module]:
    """The modules under `unit` that no unit within it holds; the unit itself first."""
    members = {unit: None}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if child not in members and not isinstance(child, FSDPModule):
                members[child] = None
                visit(child)

    visit(unit)
    return list(members)


@contextmanager
def _tracking(members: Sequence[nn.Module], replaced: WeakTensorKeyDictionary) -> Iterator[None]:
    """Record which parameter objects of `members` were replaced inside by which."""
    before = [(m, name, p) for m in members for name, p in m._parameters.items() if p is not None]
    yield
    for module, name, parameter in before:
        now = module._parameters[name]
        if now is not parameter:
            replaced[parameter] = now


def _start(root: nn.Module, members: Sequence[nn.Module], mesh: DeviceMesh) -> list[nn.Parameter]:
    """Make what `members` own real, contiguous and equal to rank 0's; returns the parameters."""
    device = mesh_device(mesh)
    materialize(root, members, device)
    parameters = dict.fromkeys(p for m in members for p in m._parameters.values() if p is not None)
    buffers = dict.fromkeys(b for m in members for b in m._buffers.values() if b is not None)
    for tensor in (*parameters, *buffers):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device).contiguous()
    broadcast_from_first([*parameters, *buffers], mesh)
    return list(parameters)


def _unshardable(parameters: Sequence[nn.Parameter]) -> set[nn.Parameter]:
    """Parameters that FSDP2 refuses, or that it would wrongly cast to a compute dtype."""
    sizes: Counter[torch.dtype] = Counter()
    for p in parameters:
        if p.requires_grad:
            sizes[p.dtype] += p.numel()
    main = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    return {
        p
        for p in parameters
        if p.ndim == 0
        or p.numel() == 0
        or not p.is_floating_point()
        or (p.requires_grad and p.dtype != main)
    }
