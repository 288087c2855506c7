"""What a load was asked for, and the plan for all models, optimizers and schedulers of a job that follows from it.

A plan says what to read and what to do afterwards; nothing is changed before it is installed. `Checkpointer` and
Accelerate both plan their loads here, so that an argument means the same in each. Lightning, which restores in an order
of its own, takes `Wanted` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zero_ckpt.core.binding import check_same_names, prefix_of, set_extra_state
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.computed import empty_like_computed, is_extra_state, set_computed
from zero_ckpt.core.control import ControlPlane
from zero_ckpt.core.custom import CustomLoad, plan_custom
from zero_ckpt.core.dtensors import layout_of, local_part
from zero_ckpt.core.naming import ParameterNames
from zero_ckpt.core.optimizers import plan_optimizer
from zero_ckpt.core.reader import Request
from zero_ckpt.core.restoring import Restoration, plan_model
from zero_ckpt.core.schedulers import plan_schedulers, scheduler_notices
from zero_ckpt.core.state import ModelState, capture_models

__all__ = ["Wanted", "plan_training", "plan_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a load was asked for, by the arguments of `Checkpointer.load_checkpoint`, which documents them.

    They have the same names and defaults in `Checkpointer`, in Lightning and in Accelerate.
    """

    load_module_strict: bool = True
    load_optimizer_states: bool = True
    load_lr_scheduler_states: bool = True
    load_module_only: bool = False
    custom_load_fn: CustomLoad | None = None
    override_hyperparameters: bool = False
    weights_only: bool = True

    @property
    def optimizers(self) -> bool:
        """Whether optimizers are restored."""
        return bool(self.load_optimizer_states) and not self.load_module_only

    @property
    def schedulers(self) -> bool:
        """Whether learning-rate schedulers are restored."""
        return bool(self.load_lr_scheduler_states) and not self.load_module_only


def plan_weights(
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module],
    objects: Mapping[str, Any],
    wanted: Wanted,
    control: ControlPlane,
    *,
    ignored: Callable[[str], bool] = lambda key: False,
) -> Restoration:
    """Fill the models' tensors, and give their modules the extra state that they keep beside tensors.

    `objects`: the tree that rank 0 stored. `ignored`: see `plan_model`, which says what is raised.
    """
    extra = objects.get("extra_state", {})
    if wanted.custom_load_fn is not None:
        return plan_custom(checkpoint, models, extra, wanted.custom_load_fn, control)
    state = capture_models(models)
    plan = plan_model(
        checkpoint,
        state,
        control.rank,
        strict=wanted.load_module_strict,
        ignored=ignored,
        no_tensors=extra,
    )
    plan.installs.append(lambda: set_extra_state(models, extra))
    _plan_computed(plan, checkpoint, models, extra, state, control.rank)
    return plan


def _plan_computed(
    plan: Restoration,
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module],
    extra: Mapping[str, Any],
    state: ModelState,
    rank: int,
) -> None:
    """Read what modules have computed for their state dicts, and let them take it in."""
    values = {
        key: value
        for key, value in extra.items()
        if not is_extra_state(key) and (key in state.tensors or key in state.extra)
    }
    for key, stored in plan.computed.items():
        placed = checkpoint.placed("model", stored)
        values[key] = tensor = empty_like_computed(placed, state.tensors.get(key))
        local, box = local_part(key, tensor, layout_of(key, tensor), rank)
        if box is not None and box.numel:
            plan.fresh.append(Request("model", stored, placed, box, local))
    if values:
        plan.installs.append(lambda: set_computed(models, values, state.aliases))


def plan_training(
    checkpoint: Checkpoint,
    names: ParameterNames,
    optimizers: Mapping[str, torch.optim.Optimizer],
    schedulers: Mapping[str, Any],
    objects: Mapping[str, Any],
    wanted: Wanted,
    rank: int,
) -> Restoration:
    """Restore optimizers and schedulers, as far as `wanted` asks for them.

    `names`: id(parameter) -> FQN, of all that the optimizers have. `objects`: the tree that rank 0 stored. Raises
    `StateMismatchError` for other optimizers than those in the checkpoint; of other schedulers there is a notice.
    """
    plan = Restoration()
    if wanted.optimizers:
        records = objects.get("optimizers", {})
        check_same_names(checkpoint.path, "optimizers", optimizers, records)
        for name, optimizer in optimizers.items():
            plan.add(
                plan_optimizer(
                    checkpoint,
                    optimizer,
                    _names_for(optimizer, records[name], names),
                    records[name],
                    rank,
                    prefix_of(name),
                    weights_only=wanted.weights_only,
                    keep_options=wanted.override_hyperparameters,
                )
            )
    if wanted.schedulers:
        saved = objects.get("lr_schedulers", {})
        plan.notices += scheduler_notices(checkpoint.path, schedulers, saved)
        plan.installs.append(
            plan_schedulers(schedulers, saved, keep_rates=wanted.override_hyperparameters)
        )
    return plan


def _names_for(
    optimizer: torch.optim.Optimizer, record: Mapping[str, Any], names: ParameterNames
) -> ParameterNames:
    """id(parameter) -> its name in `record`: an FQN, or its number where the writer knew no module."""
    if not record.get("numbered"):
        return names
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return ParameterNames({id(p): str(number) for number, p in enumerate(parameters)})
