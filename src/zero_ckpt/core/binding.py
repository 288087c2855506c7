"""Live objects under the names that they have in a checkpoint: models, optimizers and schedulers of one job.

One object is called "", several are called by their place or by names of the user's. Every door of the package names
in this way, so that what one has saved the others find.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from zero_ckpt.core.naming import ParameterNames, naming_of, parameter_names
from zero_ckpt.core.state import EXTRA_STATE
from zero_ckpt.errors import ConfigurationError, StateMismatchError

__all__ = [
    "bound_names",
    "check_kinds",
    "check_same_names",
    "named",
    "prefix_of",
    "set_extra_state",
]


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
        ("lr_scheduler", schedulers, "state_dict"),
    )
    for what, given, attribute in kinds:
        for value in given.values():
            if not hasattr(value, attribute):
                raise ConfigurationError(
                    f"{what}: found {type(value).__name__}, which has no {attribute}. The order is model, optimizer, "
                    "lr_scheduler; each is one object, a list of them, or a dict by name."
                )


def prefix_of(name: str) -> str:
    """What keys of the optimizer `name` start with."""
    return f"{name}/" if name else ""


def bound_names(models: Mapping[str, nn.Module]) -> ParameterNames:
    """id(parameter) -> FQN over all models."""
    bound = ParameterNames()
    for name, model in models.items():
        prefix, own = f"{name}." if name else "", parameter_names(model)
        bound.update({key: prefix + fqn for key, fqn in own.items()})
        bound.experts |= {prefix + path: share for path, share in own.experts.items()}
    return bound


def check_same_names(
    path: str, what: str, live: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Raises `StateMismatchError` when the job has other `what` than the checkpoint at `path`."""
    if set(live) != set(saved):
        raise StateMismatchError(
            f"{path} has other {what} than the job: {_listed(saved)} there, {_listed(live)} here. Nothing was loaded. "
            f"Give the same {what}, or load with load_module_only=True."
        )


def _listed(names: Iterable[str]) -> str:
    """By name; a single one has none."""
    shown = (f"'{name}'" if name else "one" for name in sorted(names))
    return ", ".join(shown) or "none"


def set_extra_state(models: Mapping[str, nn.Module], extra: Mapping[str, Any]) -> None:
    """Give every module that has `set_extra_state` what it returned when it was saved."""
    for name, model in models.items():
        naming = naming_of(model)
        for path, module in model.named_modules():
            raw = f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE
            key = (f"{name}." if name else "") + naming.clean(raw)
            # A wrapper goes by the name of what it wraps, and has no such state itself.
            takes = type(module).set_extra_state is not nn.Module.set_extra_state
            if takes and key in extra:
                module.set_extra_state(extra[key])
