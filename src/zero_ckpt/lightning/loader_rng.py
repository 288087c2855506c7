"""The random generators that a data loader draws its order from: how they stand, and putting them back.

The process's own (`core.rng`), and those that users gave to the loader or its samplers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from zero_ckpt.core import rng
from zero_ckpt.core.shapes import Shape

__all__ = ["MOMENT", "own_states", "put_back", "set_own_states", "states"]

MOMENT: Shape = {"rng": rng.check, "generators": {str: rng.check_generator}}
"""What `states` returns."""


def _generators(loader: DataLoader[Any]) -> dict[str, torch.Generator]:
    owners = {"loader": loader, "sampler": loader.sampler, "batches": loader.batch_sampler}
    found = {name: getattr(owner, "generator", None) for name, owner in owners.items()}
    return {name: each for name, each in found.items() if isinstance(each, torch.Generator)}


def own_states(loader: DataLoader[Any]) -> dict[str, torch.Tensor]:
    """Of the generators that users gave to the loader, by where they are."""
    return {name: each.get_state() for name, each in _generators(loader).items()}


def states(loader: DataLoader[Any]) -> dict[str, Any]:
    """Of all generators."""
    return {"rng": rng.capture(), "generators": own_states(loader)}


def put_back(loader: DataLoader[Any], moment: Mapping[str, Any]) -> None:
    """All of them, as at the moment when `states` returned this; not at all for an empty one."""
    if moment:
        rng.restore(moment["rng"])
        set_own_states(loader, moment["generators"])


def set_own_states(loader: DataLoader[Any], given: Mapping[str, torch.Tensor]) -> None:
    for name, generator in _generators(loader).items():
        if name in given:
            generator.set_state(given[name].cpu())
