"""Live objects under the names that they have in a checkpoint: models, optimizers and schedulers of one job.

Owns those names, and what a save takes of the objects under them; what a load does to them is in `load_plan`. A single
object is called "", several are called by their place in a list or by the user's own names. `Checkpointer`, Lightning
and Accelerate all name in this way, so that what one has saved the others find.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, Union

import torch
from torch import nn

from zero_ckpt.core.computed import EXTRA_STATE
from zero_ckpt.core.naming import ParameterNames, dotted, naming_of, parameter_names
from zero_ckpt.core.state import ModelState, Snapshot, capture_optimizer
from zero_ckpt.errors import ConfigurationError, StateMismatchError

__all__ = [
    "OneOrMany",
    "bound_names",
    "check_kinds",
    "check_same_names",
    "named",
    "prefix_of",
    "set_extra_state",
    "snapshot_of",
]

T = TypeVar("T")
OneOrMany = Union[T, Sequence[T], Mapping[str, T]]  # noqa: UP007 - a generic alias at run time
"""What a user may give: one object, a list of them, or a dict by name."""


def named(given: Any, what: str) -> dict[str, Any]:
    """One object, a list of them, or a dict by name -> the objects by name.

    Raises `ConfigurationError` for names that keys in a checkpoint cannot start with.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        bad = [name for name in given if not isinstance(name, str) or not name or "/" in name]
        if bad:
            raise ConfigurationError(
                f"names of {what} must be non-empty strings without '/', found {bad}"
            )
        return dict(given)
    if isinstance(given, (list, tuple)):
        return {"": given[0]} if len(given) == 1 else {str(i): x for i, x in enumerate(given)}
    return {"": given}


def check_kinds(
    models: Mapping[str, Any], optimizers: Mapping[str, Any], schedulers: Mapping[str, Any]
) -> None:
    """Raises `ConfigurationError` for arguments in each other's place."""
    kinds = (
        ("model", models, "named_parameters"),
        ("optimizer", optimizers, "param_groups"),
        # A wrapper that is no torch Optimizer lacks this one.
        ("optimizer", optimizers, "register_step_post_hook"),
        ("lr_scheduler", schedulers, "state_dict"),
    )
    for what, given, attribute in kinds:
        for value in given.values():
            if not hasattr(value, attribute):
                raise ConfigurationError(
                    f"{what}: found {type(value).__name__}, which has no {attribute}. The order is model, optimizer, "
                    "lr_scheduler; each is one object of torch's kind, a list of them, or a dict by name."
                )


def prefix_of(name: str) -> str:
    """What the stored keys of the optimizer `name` start with; "" for the only optimizer."""
    return f"{name}/" if name else ""


def bound_names(models: Mapping[str, nn.Module]) -> ParameterNames:
    """id(parameter) -> FQN over all models."""
    bound = ParameterNames()
    for name, model in models.items():
        prefix, own = dotted(name), parameter_names(model)
        bound.update({key: prefix + fqn for key, fqn in own.items()})
        bound.experts |= {prefix + path: share for path, share in own.experts.items()}
    return bound


def snapshot_of(
    state: ModelState,
    names: ParameterNames,
    optimizers: Mapping[str, torch.optim.Optimizer],
    schedulers: Mapping[str, Any],
    *,
    step: int,
    client_state: Any,
    exclude_frozen: bool,
) -> Snapshot:
    """What a save stores of live objects, as references; schedulers' states are copies. The caller adds `rank_objects`.

    `state`: of all models. `names`: id(parameter) -> FQN, of every parameter that an optimizer has. `exclude_frozen`:
    leave out parameters with `requires_grad=False`, and record which they are.
    """
    captured = {
        name: capture_optimizer(optimizer, names, prefix_of(name))
        for name, optimizer in optimizers.items()
    }
    excluded = frozenset(state.frozen) if exclude_frozen else frozenset()
    return Snapshot(
        model={key: t for key, t in state.tensors.items() if key not in excluded},
        optim={key: t for each in captured.values() for key, t in each.tensors.items()},
        objects={
            "client_state": client_state,
            "global_step": step,
            "optimizers": {name: each.record for name, each in captured.items()},
            "lr_schedulers": {name: each.state_dict() for name, each in schedulers.items()},
            "extra_state": state.extra,
        },
        buffers=frozenset(state.buffers),
        frozen=frozenset(state.frozen) - excluded,
        aliases={alias: key for alias, key in state.aliases.items() if key not in excluded},
        excluded=excluded,
        experts=state.experts,
        notices=tuple(each.notice for each in captured.values()),
    )


def check_same_names(
    path: str, what: str, live: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Raises `StateMismatchError` when the job's objects have other names than the saved ones.

    `what`: their kind, for the message. `path`: of the checkpoint.
    """
    if set(live) != set(saved):
        raise StateMismatchError(
            f"{path} has other {what} than the job: {_listed(saved)} there, {_listed(live)} here. Nothing was loaded. "
            f"Give the same {what}, or load with load_module_only=True."
        )


def _listed(names: Iterable[str]) -> str:
    """The names in quotes; "one" for a single object, whose name is empty."""
    shown = (f"'{name}'" if name else "one" for name in sorted(names))
    return ", ".join(shown) or "none"


def set_extra_state(models: Mapping[str, nn.Module], extra: Mapping[str, Any]) -> None:
    """Give every module that has `set_extra_state` what it returned when it was saved."""
    for name, model in models.items():
        naming = naming_of(model)
        for path, module in model.named_modules():
            key = dotted(name) + naming.clean(dotted(path) + EXTRA_STATE)
            # A wrapper's cleaned name is that of the module inside, and a wrapper has no such state itself.
            takes = type(module).set_extra_state is not nn.Module.set_extra_state
            if takes and key in extra:
                module.set_extra_state(extra[key])
