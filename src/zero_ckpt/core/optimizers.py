"""What a load must read for an optimizer. Its state is created from the manifest, without a dummy step.

Parameters are matched by name, so order and grouping may differ between the runs. Owns the checks that a stored state
is this optimizer's, and what is put into it at the end; changes nothing before `Restoration.install`. Under Lightning
the weights were loaded before, so errors here speak of the optimizer only, and do not say that nothing was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zero_ckpt.core.begun_state import begun_notice, begun_state
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.dtensors import TORCH_DTYPES
from zero_ckpt.core.groups import check_same_parameters, matched_options, take_options
from zero_ckpt.core.naming import ParameterNames
from zero_ckpt.core.optimizer_state import StateBuilder
from zero_ckpt.core.own_state import give_own_state
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.state import by_parameter, group_names, holder_of, names_in_groups
from zero_ckpt.errors import StateMismatchError

__all__ = ["plan_optimizer"]


def plan_optimizer(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer,
    names: ParameterNames,
    record: Mapping[str, Any],
    rank: int,
    prefix: str = "",
    *,
    weights_only: bool = True,
    keep_options: bool = False,
) -> Restoration:
    """Create the state of every parameter that this rank holds state for, and take over the groups' options.

    `record` is what `capture_optimizer` recorded, `prefix` and `names` as there. `keep_options`: every group keeps its
    own options; state that only these take begins at zero, with a notice. Raises `StateMismatchError` when the
    parameters of the groups, or the kind of optimizer, are not those of the checkpoint.
    """
    fqn_of = names_in_groups(optimizer, names)
    groups = group_names(optimizer, names, fqn_of)
    _check_kind(checkpoint.path, optimizer, record)
    check_same_parameters(checkpoint.path, groups, record["groups"])
    options: Sequence[Mapping[str, Any]] = [{} for _ in groups]
    if not keep_options:
        options = matched_options(checkpoint.path, groups, record["groups"])
    stored = by_parameter(checkpoint.keys("optim"), prefix, set(fqn_of.values()))
    plan = Restoration()
    states: dict[torch.Tensor, StateBuilder | None] = {}
    holder = holder_of(optimizer)
    begun: set[str] = set()
    alike = len(holder.param_groups) == len(options)
    for index, group in enumerate(holder.param_groups):
        final = {**group, **options[index]} if alike else group
        cpu_step = not (final.get("capturable") or final.get("fused"))
        for parameter in group["params"]:
            found = stored.get(fqn_of[id(parameter)])
            if found is None:
                states[parameter] = None
                continue
            live = holder.state.get(parameter) or {}
            saved = _stored_dtype(checkpoint, fqn_of[id(parameter)])
            builder = StateBuilder(checkpoint, parameter, saved, live, rank, cpu_step, weights_only)
            for name, key in found.items():
                builder.add(name, key)
            if keep_options:
                builder.begun = begun_state(holder, final, found)
                begun |= builder.begun.keys()
            if builder.rounds and not plan.notices:
                plan.notices.append(_rounding_notice(checkpoint.path, saved, parameter.dtype))
            plan.live += builder.live
            plan.fresh += builder.fresh
            plan.checks.append(builder.state)
            states[parameter] = builder
    plan.notices += filter(None, [begun_notice(checkpoint.path, begun)])
    plan.installs.append(lambda: give_own_state(holder, record.get("rest", {})))
    plan.installs.append(lambda: _install(optimizer, holder, states, options))
    return plan


def _check_kind(path: str, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]) -> None:
    mine, saved = type(holder_of(optimizer)).__name__, record["class"]
    if saved and mine != saved and not ({mine, saved} <= {"Adam", "AdamW"}):
        raise StateMismatchError(
            f"{path}: the optimizer was {saved} when it was saved and is {mine} now; their states are not the same "
            "thing. No optimizer was changed. Use the same class, or load with load_optimizer_states=False."
        )


def _stored_dtype(checkpoint: Checkpoint, fqn: str) -> torch.dtype | None:
    """The dtype that the parameter was saved in; None when it was not saved."""
    stored = checkpoint.resolve(fqn)
    return None if stored is None else TORCH_DTYPES[checkpoint.placed("model", stored).dtype]


def _rounding_notice(path: str, saved: torch.dtype | None, live: torch.dtype) -> str:
    return (
        f"{path}: parameters and optimizer state are {saved} there, and the parameters are {live} here: the state is "
        f"rounded to {live}, since optimizers do not mix dtypes. It stays exact in a model that keeps {saved} weights "
        "and computes in 16 bits (autocast, or a mixed-precision policy)."
    )


def _install(
    optimizer: torch.optim.Optimizer,
    holder: torch.optim.Optimizer,
    states: Mapping[torch.Tensor, StateBuilder | None],
    options: Sequence[Mapping[str, Any]],
) -> None:
    for parameter, builder in states.items():
        holder.state.pop(parameter, None)
        if builder is not None:
            holder.state[parameter] = builder.state()
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        take_options(group, saved)
    if holder is not optimizer and len(holder.param_groups) == len(optimizer.param_groups):
        for group, saved in zip(holder.param_groups, options, strict=True):
            take_options(group, saved)
