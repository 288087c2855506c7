"""Optimizer state as Lightning's checkpoint dict shows it, and back into live optimizers.

The shape is that of `torch.optim.Optimizer.state_dict()`, with parameter names for numbers and this
rank's tensors as they are: shards (DTensors), or, under stage 1, only the parameters that this rank
updates. Making one communicates nothing and copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.naming import ParameterNames, naming_of
from zero_ckpt.core.optimizers import plan_optimizer
from zero_ckpt.core.own_state import give_own_state, own_state
from zero_ckpt.core.parts import part_like, placed_like
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.state import group_names, holder_of, local_states, names_in_groups
from zero_ckpt.errors import StateMismatchError

__all__ = ["Pristine", "plan_state", "pruned_names", "rest_of", "state_of"]

_KNOWN = frozenset({"class", "state", "param_groups"})


def rest_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an optimizer's state dict that belong to the optimizer's own class."""
    return {key: value for key, value in state.items() if key not in _KNOWN}


def state_of(
    optimizer: torch.optim.Optimizer,
    names: ParameterNames,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """This rank's state of an optimizer, by parameter name. References, not copies.

    `renamed`: what parameters are called in the checkpoint, where that is not what they are called now.
    """
    fqn_of = names_in_groups(optimizer, names)
    groups = group_names(optimizer, names, fqn_of)
    state = {fqn_of[id(p)]: dict(values) for p, values in local_states(optimizer)}
    return {
        **own_state(holder_of(optimizer)),
        "class": type(holder_of(optimizer)).__name__,
        "state": {renamed.get(fqn, fqn): values for fqn, values in state.items()},
        "param_groups": [
            {"params": [renamed.get(fqn, fqn) for fqn in fqns], **options}
            for fqns, options in groups
        ],
    }


def pruned_names(module: nn.Module) -> dict[str, str]:
    """Names of parameters that `torch.nn.utils.prune` has renamed -> their names from before."""
    clean = naming_of(module).clean
    buffers = {clean(name) for name, _ in module.named_buffers()}
    parameters = [clean(name) for name, _ in module.named_parameters()]
    pruned = [name for name in parameters if name.endswith("_orig")]
    before = {name: name.removesuffix("_orig") for name in pruned}
    return {name: own for name, own in before.items() if f"{own}_mask" in buffers}


@dataclass(frozen=True, slots=True)
class Pristine:
    """An optimizer's state as it came from a checkpoint, to see whether a hook has changed it."""

    checkpoint: Checkpoint
    prefix: str
    tensors: Mapping[Any, Mapping[str, Any]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, prefix: str, state: Mapping[str, Any]) -> Pristine:
        tensors = {p: dict(values) for p, values in state.get("state", {}).items()}
        return cls(checkpoint, prefix, tensors)

    def is_unchanged(self, state: Mapping[str, Any]) -> bool:
        """Whether the tensors are still the stored ones. Options of groups may have changed."""
        now = state["state"]
        return now.keys() == self.tensors.keys() and all(
            now[p].keys() == values.keys() and all(now[p][k] is v for k, v in values.items())
            for p, values in self.tensors.items()
        )


def plan_state(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    names: ParameterNames,
    rank: int,
    pristine: Pristine | None,
    *,
    keep_options: bool = False,
) -> Restoration:
    """What to read and to install so that the optimizer continues with `state`.

    `state`: by names as `state_of` made it, or by numbers as torch does. `keep_options`: every
    group keeps its own options. Raises `StateMismatchError` when its parameters are not the
    optimizer's.
    """
    numbered = any(isinstance(p, int) for group in state["param_groups"] for p in group["params"])
    if pristine is not None and not numbered and pristine.is_unchanged(state):
        record = {"class": state["class"], "groups": _groups(state), "rest": rest_of(state)}
        return plan_optimizer(
            pristine.checkpoint,
            optimizer,
            names,
            record,
            rank,
            pristine.prefix,
            keep_options=keep_options,
        )
    by_parameter = _matched(optimizer, state, names, numbered)
    plan = Restoration()
    groups = [] if keep_options else state["param_groups"]
    rest = rest_of(state)
    plan.installs.append(lambda: give_own_state(holder_of(optimizer), rest))
    plan.installs.append(lambda: _install(optimizer, by_parameter, groups))
    return plan


def _groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"params": group["params"], "options": {k: v for k, v in group.items() if k != "params"}}
        for group in state["param_groups"]
    ]


def _matched(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    names: ParameterNames,
    numbered: bool,
) -> dict[int, Mapping[str, Any]]:
    """id(parameter) -> its saved state. Groups match by their order and size, as in torch."""
    live = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    saved = [list(group["params"]) for group in state["param_groups"]]
    fqn_of = names_in_groups(optimizer, names)
    sizes = [len(fqns) for fqns, _ in group_names(optimizer, names, fqn_of)]
    if sizes != [len(group) for group in saved]:
        raise StateMismatchError(
            f"the optimizer has {len(live)} parameter groups of {sizes} "
            f"parameters, the checkpoint {len(saved)} of {[len(g) for g in saved]}. Nothing of the "
            "optimizer was loaded. Create it as it was when it was saved."
        )
    states = state["state"]
    if not numbered:
        return {p: states.get(names.get(p), {}) for group in live for p in group}
    return {
        parameter: states.get(number, {})
        for group, numbers in zip(live, saved, strict=True)
        for parameter, number in zip(group, numbers, strict=True)
    }


def _install(
    optimizer: torch.optim.Optimizer,
    by_parameter: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    inner = holder_of(optimizer)
    for group in inner.param_groups:
        cpu_step = not (group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            values = by_parameter.get(id(parameter), {})
            inner.state.pop(parameter, None)
            if values:
                placed = {k: _placed(v, k, parameter, cpu_step) for k, v in values.items()}
                inner.state[parameter] = placed
    for holder in {id(optimizer): optimizer, id(inner): inner}.values():
        for group, saved in zip(holder.param_groups, groups, strict=False):
            group.update({k: v for k, v in saved.items() if k != "params"})


def _placed(value: Any, name: str, parameter: torch.Tensor, cpu_step: bool) -> Any:
    """A value of the state as the optimizer wants it: a whole tensor is laid out like a parameter of its shape."""
    if isinstance(value, LazyTensor):
        value = value.materialize()
    if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
        return value
    if name == "step" and value.ndim == 0:
        return value.clone() if cpu_step else value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor) and value.ndim and value.shape == parameter.shape:
        return part_like(value, parameter)
    return placed_like(value.to(parameter.device).clone(), parameter)
