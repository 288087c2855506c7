"""DeepSpeed's optimizer groups in the terms of torch's optimizers: class, groups by name, options, steps.

DeepSpeed does not record which class it stepped with. What the class is shows in the names of its options and states;
where it does not, none is recorded. Its own optimizers count steps in a number of the group or the state, torch's in a
small tensor for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zero_ckpt.interop.deepspeed.column import Column, Value

__all__ = ["class_of", "options_of", "states_of"]

_STEP = "step"

_MARKS = ("moe", "name")
"""Options (`True`, `ep_size_2`) that DeepSpeed adds where it splits a user's groups into dense ones and experts."""

_CLASSES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "lion": "Lion",
    "muon": "Muon",
    "lamb": "Lamb",
    "adamax": "Adamax",
    "nadam": "NAdam",
    "radam": "RAdam",
    "adadelta": "Adadelta",
}
"""Names in DeepSpeed's configuration, lower case and without parts that tell the implementation -> torch's classes."""


def class_of(whole: Column, config: Any) -> str:
    """The name of torch's class for this optimizer, or "" when nothing tells. `config`: DeepSpeed's configuration."""
    told = config.get("optimizer") if isinstance(config, dict) else None
    name = told.get("type") if isinstance(told, dict) else None
    if isinstance(name, str):
        return _CLASSES.get(_plain(name), name)
    options = {key for group in whole.groups for key in group.options}
    return _by_traits(options, {key for state in whole.states.values() for key in state})


def _plain(name: str) -> str:
    name = name.lower().replace("_", "")
    for prefix in ("deepspeedcpu", "torch", "fused", "cpu"):
        name = name.removeprefix(prefix)
    return name


def _by_traits(options: set[str], states: set[str]) -> str:
    if {"exp_avg", "exp_avg_sq"} <= states and "betas" in options:
        return "AdamW"
    if "momentum_buffer" in states or {"momentum", "dampening", "nesterov"} <= options:
        return "SGD" if "dampening" in options else "Muon"
    if "square_avg" in states:
        return "RMSprop"
    if "sum" in states and "lr_decay" in options:
        return "Adagrad"
    return "Lion" if "exp_avg" in states and "betas" in options else ""


def options_of(options: Mapping[str, Any], whole: Column) -> dict[str, Any]:
    """A group's options without the count of steps, which is state, and without marks of how experts were spread."""
    has_experts = any("moe" in group.options for group in whole.groups)
    others = {_STEP, *(_MARKS if has_experts else ())}
    return {key: value for key, value in options.items() if key not in others}


def states_of(whole: Column) -> Iterable[tuple[str, dict[str, Value]]]:
    """(parameter, states) of all parameters that have any; the step also where the group counts it."""
    counted: dict[str, float] = {}
    for group in whole.groups:
        step = group.options.get(_STEP)
        if isinstance(step, (int, float)):
            counted |= dict.fromkeys(group.names, float(step))
    for name, states in whole.states.items():
        if _STEP not in states and name in counted:
            yield name, {_STEP: counted[name], **states}
        else:
            yield name, states
