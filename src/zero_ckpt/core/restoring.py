"""What a load must read, and a model's part of it: bookkeeping between stored keys and live tensors.

Owns `Restoration`, the list of all that one load has to do, to which models, optimizers and the rest each add their
part; and the matching of a model's tensors, by name. Nothing is read or changed here: parameters are filled in place by
`live` requests, what is created for the load by `fresh` ones, and `install` puts that in its place when all bytes have
arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.dtensors import layout_of, local_part
from zero_ckpt.core.naming import is_elsewhere
from zero_ckpt.core.reader import Request
from zero_ckpt.core.state import ModelState
from zero_ckpt.errors import StateMismatchError

__all__ = ["Restoration", "plan_model"]


@dataclass(slots=True)
class Restoration:
    """Reads to make, what to do afterwards, and what did not match.

    `live`: reads that overwrite live tensors. `fresh`: reads into new memory. `checks`: called when the fresh reads are
    made; they may raise, and change nothing. `installs`: called at the end, and put the new state in its place.
    `computed`: key -> stored tensor of what only the model's own loading can place.
    `missing`, `unexpected`: as in `LoadReport`. `excluded`: frozen parameters that were left out of the save and keep
    their live values. `notices`: what the user should know once all is loaded.
    """

    live: list[Request] = field(default_factory=list)
    fresh: list[Request] = field(default_factory=list)
    checks: list[Callable[[], object]] = field(default_factory=list)
    installs: list[Callable[[], None]] = field(default_factory=list)
    computed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def add(self, other: Restoration) -> None:
        """Take in what `other` has to read, check, install and tell."""
        self.live += other.live
        self.fresh += other.fresh
        self.checks += other.checks
        self.installs += other.installs
        self.notices += other.notices

    def check(self) -> None:
        for action in self.checks:
            action()

    def install(self) -> None:
        for action in self.installs:
            action()


def plan_model(
    checkpoint: Checkpoint,
    state: ModelState,
    rank: int,
    *,
    strict: bool = True,
    ignored: Callable[[str], bool] = lambda key: False,
    no_tensors: Container[str] = (),
) -> Restoration:
    """Fill every live tensor from the stored one of its name.

    Raises `StateMismatchError` for other shapes, and when `strict` for missing or unexpected keys: all of them at once.
    Frozen parameters that were left out of the save on purpose keep their live values. `ignored(key)`: whether a stored
    key is not meant for this load, and so not unexpected. `no_tensors`: keys of values that are stored elsewhere.
    """
    plan, wrong = Restoration(), []
    used: set[str] = set()
    tensors = checkpoint.manifest.tensors["model"]
    for key, tensor in state.tensors.items():
        stored = key if key in tensors else _stored_name(checkpoint, key, state.aliases)
        if stored is None:
            if key in state.computed and key in no_tensors:
                continue  # an empty list when it was saved, and a tensor now, say
            left_out = key in checkpoint.manifest.excluded
            (plan.excluded if left_out else plan.missing).append(key)
            continue
        used.add(stored)
        if key in state.computed:
            plan.computed[key] = stored
            continue
        placed, layout = tensors[stored], layout_of(key, tensor)
        if placed.shape != layout.shape:
            wrong.append(
                f"'{key}': {list(placed.shape)} in the checkpoint, {list(layout.shape)} in the model"
            )
            continue
        local, box = local_part(key, tensor, layout, rank)
        _check_fillable(key, local)
        if box is not None and box.numel:
            plan.live.append(Request("model", stored, placed, box, local))
    for key in state.computed & state.extra.keys() & tensors.keys():
        plan.computed[key] = key  # a tensor when it was saved, and an empty list now, say
    # A checkpoint of untied weights has a tensor for each name of a tied one: the first is taken.
    known = used | state.aliases.keys() | state.extra.keys()
    plan.unexpected = [
        key
        for key in checkpoint.keys("model")
        if not (key in known or ignored(key) or is_elsewhere(key, state.experts))
    ]
    _raise_mismatch(checkpoint.path, plan, wrong, strict)
    return plan


def _check_fillable(key: str, tensor: torch.Tensor) -> None:
    steps = tensor.stride()
    if 0 in steps and any(n > 1 and not step for n, step in zip(tensor.shape, steps, strict=True)):
        raise StateMismatchError(
            f"tensor '{key}' of the model was expanded: several of its elements are one place in memory, which "
            "cannot be filled. Nothing was loaded. Make it a tensor of its own with clone()."
        )


def _stored_name(checkpoint: Checkpoint, key: str, aliases: Mapping[str, str]) -> str | None:
    found = checkpoint.resolve(key)
    if found is not None:
        return found
    tied = (alias for alias, first in aliases.items() if first == key)
    return next((name for alias in tied if (name := checkpoint.resolve(alias))), None)


def _raise_mismatch(path: str, plan: Restoration, wrong: Sequence[str], strict: bool) -> None:
    parts = []
    if wrong:
        parts.append("Other shapes: " + "; ".join(wrong))
    if strict and plan.missing:
        parts.append("Missing in the checkpoint: " + _names(plan.missing))
    if strict and plan.unexpected:
        parts.append("In the checkpoint but not in the model: " + _names(plan.unexpected))
    if parts:
        remedy = (
            "Build it with the checkpoint's sizes, or leave these tensors out with custom_load_fn."
            if wrong
            else "To load what matches, turn strict loading off."
        )
        raise StateMismatchError(
            f"{path} does not fit the model. {'. '.join(parts)}. Nothing was loaded. {remedy}"
        )


def _names(keys: Sequence[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys)
