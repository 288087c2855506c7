"""Accelerate's hooks before a save and before a load, with what their contract promises.

A save hook gets `(models, weights, output_dir)`: `weights` is a list of the models' state dicts, and what it leaves in
that list is what is stored. Many hooks edit it on the main process only, so rank 0's list counts for all ranks. A load
hook gets `(models, input_dir)`, and the models that it takes out of the list are not loaded. Under Accelerate's FSDP
plugin both lists leave the models out (`weights` and the load hooks' `models` are empty), as in Accelerate.

State dicts that hooks see hold live tensors: of a sharded model, this rank's parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from zero_ckpt.accelerate.base import ZeroBase, prepared_model
from zero_ckpt.core.computed import is_extra_state
from zero_ckpt.core.naming import dotted, naming_of
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.state import ModelState

__all__ = ["Edits", "Offered", "apply_edits", "run_load_hooks", "run_save_hooks"]


@dataclass(slots=True)
class Edits:
    """What rank 0's hooks made of the weights.

    `removed`: names of models that are not stored. `dropped`, `replaced`: stored keys that are left out, or have a new
    value.
    """

    removed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)

    def as_record(self) -> list[list[str]]:
        return [self.removed, self.dropped, self.replaced]


@dataclass(slots=True)
class Offered:
    """The state dicts that hooks got, and what they were before. `values`: new values, by stored key."""

    weights: list[dict[str, Any]]
    edits: Edits
    values: dict[str, torch.Tensor] = field(default_factory=dict)


def run_save_hooks(accelerator: ZeroBase, output_dir: str) -> Offered:
    """Call every hook, and compare what they left with what they got."""
    hooks = list(accelerator._save_model_state_pre_hook.values())
    weights: list[dict[str, Any]] = []
    offered = Offered(weights, Edits())
    if not hooks:
        return offered
    is_listed = accelerator.distributed_type != DistributedType.FSDP
    if is_listed:
        weights += [dict(model.state_dict()) for model in accelerator._models]
    given = list(weights)
    before = [dict(each) for each in given]
    for hook in hooks:
        hook(accelerator._models, weights, output_dir)
    if is_listed:
        _compare(accelerator, offered, given, before)
    return offered


def _compare(
    accelerator: ZeroBase,
    offered: Offered,
    given: list[dict[str, Any]],
    before: list[dict[str, Any]],
) -> None:
    names = {id(prepared_model(model)): name for name, model in accelerator.zero_models().items()}
    left = _what_became_of(given, offered.weights)
    added = len(offered.weights) - sum(own is not None for own in left)
    if added:
        text = (
            f"hooks have added {added} state dicts that belong to no prepared model; they are not stored. Write them "
            "into output_dir, or register their owner for checkpointing."
        )
        warn_on_first(accelerator.process_index, [text])
    seen: set[str] = set()
    for model, own, was in zip(accelerator._models, left, before, strict=False):
        name = names[id(prepared_model(model))]
        if name in seen:
            continue
        seen.add(name)
        if own is None:
            offered.edits.removed.append(name)
        else:
            _compare_one(offered, name, model, own, was)


def _what_became_of(
    given: Sequence[dict[str, Any]], weights: Sequence[dict[str, Any]]
) -> list[dict[str, Any] | None]:
    """For each state dict that hooks got: itself, another one that was put in its place, or None."""
    remaining = {id(each): each for each in weights}
    left = [remaining.get(id(each)) for each in given]
    if len(weights) == len(given):
        known = {id(each) for each in given}
        for place, now in enumerate(weights):
            if left[place] is None and id(now) not in known:
                left[place] = now
    return left


def _compare_one(
    offered: Offered, name: str, model: nn.Module, own: dict[str, Any], was: dict[str, Any]
) -> None:
    naming = naming_of(model)
    stored = {raw: dotted(name) + naming.clean(raw) for raw in {**was, **own}}
    offered.edits.dropped += [stored[raw] for raw in was if raw not in own]
    for raw, value in own.items():
        is_weight = isinstance(value, torch.Tensor) and not is_extra_state(stored[raw])
        if is_weight and value is not was.get(raw):
            offered.edits.replaced.append(stored[raw])
            offered.values[stored[raw]] = value


def apply_edits(
    state: ModelState, edits: Edits, values: Mapping[str, torch.Tensor], rank: int
) -> None:
    """Make `state` what the hooks left. New `values` are stored by rank 0 alone."""
    for key in (*edits.dropped, *edits.replaced):
        _take_out(state, key)
    if rank == 0:
        state.tensors |= values


def _take_out(state: ModelState, key: str) -> None:
    """Remove one key. Of tied weights, another name takes the tensor over."""
    state.extra.pop(key, None)
    if state.aliases.pop(key, None) is not None:
        return
    tensor = state.tensors.pop(key, None)
    heirs = [alias for alias, first in state.aliases.items() if first == key]
    if tensor is not None and heirs:
        heir = heirs[0]
        state.tensors[heir] = tensor
        state.aliases = {a: heir if f == key else f for a, f in state.aliases.items() if a != heir}
        for group in (state.buffers, state.frozen):
            if key in group:
                group.add(heir)
    state.buffers.discard(key)
    state.frozen.discard(key)


def run_load_hooks(accelerator: ZeroBase, input_dir: str) -> dict[str, nn.Module]:
    """Call every hook. Returns the models that are left to load, by name."""
    models = accelerator.zero_models()
    if accelerator.distributed_type == DistributedType.FSDP:
        listed: list[nn.Module] = []
    else:
        listed = list(accelerator._models)
    kept = list(listed)
    for hook in accelerator._load_model_state_pre_hook.values():
        hook(kept, input_dir)
    left = {id(prepared_model(model)) for model in kept}
    gone = {id(prepared_model(model)) for model in listed} - left
    return {name: model for name, model in models.items() if id(prepared_model(model)) not in gone}
