"""State that options need which were switched on after the save: the checkpoint has none, and it begins at zero.

That is what torch's own optimizers begin with. They make it together with the rest of a parameter's state and never
later, so that without it their next step would fail.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import optim

__all__ = ["begun_notice", "begun_state"]

_NEEDED = (
    ((optim.Adam, optim.AdamW), "amsgrad", "max_exp_avg_sq", "exp_avg_sq"),
    ((optim.RMSprop,), "momentum", "momentum_buffer", "square_avg"),
    ((optim.RMSprop,), "centered", "grad_avg", "square_avg"),
)
"""Classes, an option, the state that it takes, and state of the same shape and dtype that is always there."""


def begun_state(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], stored: Collection[str]
) -> dict[str, str]:
    """Name of a state -> the stored state whose shape and dtype it gets: all that `options` need and `stored` lacks."""
    return {
        name: like
        for classes, option, name, like in _NEEDED
        if isinstance(optimizer, classes) and options.get(option)
        if name not in stored and like in stored
    }


def begun_notice(path: str, begun: Collection[str]) -> str:
    """What to tell the user, or ""."""
    if not begun:
        return ""
    shown = ", ".join(f"'{name}'" for name in sorted(begun))
    return (
        f"{path}: options that the optimizer has here, and had not when it was saved, take state that begins at zero: "
        f"{shown}. Load without override_hyperparameters to go on with the options of the checkpoint."
    )
