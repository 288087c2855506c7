"""What a load must read, for a live model and its optimizers: pure bookkeeping between stored keys and live tensors.

Nothing is read or changed here. Parameters are filled in place (`live` requests); optimizer state is created from the
manifest with the stored dtypes (`fresh` requests), without a dummy step, and installed by `install` when all bytes
have arrived. Everything is matched by name, so order and grouping may differ between the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.dtensors import (
    TORCH_DTYPES,
    dtensor_from,
    layout_of,
    local_part,
    local_shape,
    local_tensor,
)
from zero_ckpt.core.groups import check_same_parameters, matched_options, take_options
from zero_ckpt.core.memory import prefer_huge_pages
from zero_ckpt.core.naming import ParameterNames, is_elsewhere
from zero_ckpt.core.objects import decode_objects
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.reader import Request
from zero_ckpt.core.state import (
    ModelState,
    by_parameter,
    group_names,
    names_in_groups,
    python_value,
    split_state_name,
)
from zero_ckpt.errors import StateMismatchError

__all__ = ["Restoration", "plan_model", "plan_optimizer"]


@dataclass(slots=True)
class Restoration:
    """Reads to make, what to do afterwards, and what did not match.

    `checks`: what may still fail once the fresh reads are made, and changes nothing. `excluded`: frozen parameters that
    were left out of the save and keep their live values. `notices`: what the user should know once all is loaded.
    """

    live: list[Request] = field(default_factory=list)
    fresh: list[Request] = field(default_factory=list)
    checks: list[Callable[[], object]] = field(default_factory=list)
    installs: list[Callable[[], None]] = field(default_factory=list)
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
) -> Restoration:
    """Fill every live tensor from the stored one of its name.

    Raises `StateMismatchError` for other shapes, and when `strict` for missing or unexpected keys: all of them at once.
    Frozen parameters that were left out of the save on purpose keep their live values. `ignored`: stored keys that are
    nobody's business here, so not unexpected.
    """
    plan, wrong = Restoration(), []
    used: set[str] = set()
    for key, tensor in state.tensors.items():
        stored = _stored_name(checkpoint, key, state.aliases)
        if stored is None:
            left_out = key in checkpoint.manifest.excluded
            (plan.excluded if left_out else plan.missing).append(key)
            continue
        used.add(stored)
        placed, layout = checkpoint.placed("model", stored), layout_of(key, tensor)
        if placed.shape != layout.shape:
            wrong.append(
                f"'{key}': {list(placed.shape)} in the checkpoint, {list(layout.shape)} in the model"
            )
            continue
        local, box = local_part(key, tensor, layout, rank)
        if 0 in local.stride() and _is_expanded(local):
            raise StateMismatchError(
                f"tensor '{key}' of the model was expanded: several of its elements are one place in memory, which "
                "cannot be filled. Nothing was loaded. Make it a tensor of its own with clone()."
            )
        if box is not None and box.numel:
            plan.live.append(Request("model", stored, placed, box, local))
    # A checkpoint of untied weights has a tensor for each name of a tied one: the first is taken.
    known = used | state.aliases.keys()
    plan.unexpected = [
        key
        for key in checkpoint.keys("model")
        if not (key in known or ignored(key) or is_elsewhere(key, state.experts))
    ]
    _raise_mismatch(checkpoint.path, plan, wrong, strict)
    return plan


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _stored_name(checkpoint: Checkpoint, key: str, aliases: Mapping[str, str]) -> str | None:
    found = checkpoint.resolve(key)
    if found is not None:
        return found
    tied = (alias for alias, first in aliases.items() if first == key)
    return next((name for alias in tied if (name := checkpoint.resolve(alias))), None)


def _raise_mismatch(path: str, plan: Restoration, wrong: Sequence[str], strict: bool) -> None:
    parts = []
    if wrong:
        parts.append("other shapes: " + "; ".join(wrong))
    if strict and plan.missing:
        parts.append("missing in the checkpoint: " + _names(plan.missing))
    if strict and plan.unexpected:
        parts.append("in the checkpoint but not in the model: " + _names(plan.unexpected))
    if parts:
        hint = "" if wrong else " To load what matches, turn strict loading off."
        raise StateMismatchError(
            f"{path} does not fit the model. {'. '.join(parts)}. Nothing was loaded.{hint}"
        )


def _names(keys: Sequence[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys)


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
    own options. Raises `StateMismatchError` when the parameters of the groups, or the kind of optimizer, are not those
    of the checkpoint.
    """
    groups = group_names(optimizer, names)
    _check_kind(checkpoint.path, optimizer, record)
    check_same_parameters(checkpoint.path, groups, record["groups"])
    options: Sequence[Mapping[str, Any]] = [{} for _ in groups]
    if not keep_options:
        options = matched_options(checkpoint.path, groups, record["groups"])
    fqn_of = names_in_groups(optimizer, names)
    stored = by_parameter(checkpoint.keys("optim"), prefix, set(fqn_of.values()))
    plan = Restoration()
    states: dict[torch.Tensor, _StateBuilder | None] = {}
    holder = _holder(optimizer)
    for group in holder.param_groups:
        cpu_step = not (group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            found = stored.get(fqn_of[id(parameter)])
            if found is None:
                states[parameter] = None
                continue
            live = holder.state.get(parameter) or {}
            saved = _stored_dtype(checkpoint, fqn_of[id(parameter)])
            builder = _StateBuilder(
                checkpoint, parameter, saved, live, rank, cpu_step, weights_only
            )
            for name, key in found.items():
                builder.add(name, key)
            if builder.rounds and not plan.notices:
                plan.notices.append(_rounding_notice(checkpoint.path, saved, parameter.dtype))
            plan.live += builder.live
            plan.fresh += builder.fresh
            plan.checks.append(builder.state)
            states[parameter] = builder
    plan.installs.append(lambda: _install(optimizer, holder, states, options))
    return plan


def _holder(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose `state` this rank steps with: ZeroRedundancyOptimizer's local one, or itself."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def _check_kind(path: str, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]) -> None:
    mine, saved = type(_holder(optimizer)).__name__, record["class"]
    if saved and mine != saved and not ({mine, saved} <= {"Adam", "AdamW"}):
        raise StateMismatchError(
            f"{path}: the optimizer was {saved} when it was saved and is {mine} now; their states are not the same "
            "thing. Nothing was loaded. Use the same class, or load with load_optimizer_states=False."
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


class _StateBuilder:
    """Finds or allocates one parameter's state tensors, and turns them into its state when they are filled.

    State that the optimizer has already, of the stored dtype and shape, is filled in place: no second copy is held.
    State keeps the stored dtype; but where it had its parameter's and that is another one here, it follows, as torch's
    optimizers need it. `rounds`: some values may not be exact then.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parameter: torch.Tensor,
        saved_dtype: torch.dtype | None,
        state: Mapping[str, Any],
        rank: int,
        cpu_step: bool,
        weights_only: bool,
    ) -> None:
        self.live: list[Request] = []
        self.fresh: list[Request] = []
        self.rounds = False
        self._saved_dtype = saved_dtype
        self._checkpoint, self._parameter, self._state = checkpoint, parameter, state
        self._rank, self._cpu_step, self._weights_only = rank, cpu_step, weights_only
        self._tensors: dict[str, torch.Tensor] = {}
        self._entries: dict[str, torch.Tensor] = {}

    def add(self, name: str, key: str) -> None:
        placed = self._checkpoint.placed("optim", key)
        base, kind = split_state_name(name)
        live = None if kind else self._fitting(placed, base)
        tensor = self._empty(placed, base, kind) if live is None else live
        if kind == "entry":
            self._entries[key] = tensor
        else:
            self._tensors[name] = tensor
        local, box = local_part(key, tensor, layout_of(key, tensor), self._rank)
        if box is not None and box.numel:
            requests = self.fresh if live is None else self.live
            requests.append(Request("optim", key, placed, box, local))

    def _fitting(self, placed: Placed, name: str) -> torch.Tensor | None:
        """The live state tensor, when the stored one can take its place value by value."""
        value = self._state.get(name)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != placed.shape:
            return None
        fits = value.dtype == TORCH_DTYPES[placed.dtype]
        return (
            value if fits and isinstance(value, DTensor) == self._is_sharded(placed, name) else None
        )

    def _is_sharded(self, placed: Placed, name: str) -> bool:
        stored = placed.placements is not None or (bool(placed.shape) and name != "step")
        return isinstance(self._parameter, DTensor) and stored

    def state(self) -> dict[str, Any]:
        """The state, once every request is filled."""
        values: dict[str, Any] = {}
        for name, tensor in self._tensors.items():
            base, kind = split_state_name(name)
            if not kind:
                values[base] = tensor
            elif kind == "json":
                values[base] = self._decoded(tensor, base)
            else:
                values[base] = python_value(kind, tensor)
        return values

    def _decoded(self, tensor: torch.Tensor, name: str) -> Any:
        entry = self._entries.__getitem__
        return decode_objects(
            tensor.numpy().tobytes(),
            entry,
            dtensor=entry,
            weights_only=self._weights_only,
            where=f"{self._checkpoint.path}: optimizer state '{name}'",
        )

    def _empty(self, placed: Placed, name: str, kind: str) -> torch.Tensor:
        """A tensor that lies where the optimizer wants it: like its parameter, where it can."""
        dtype = TORCH_DTYPES[placed.dtype]
        parameter = self._parameter
        if kind:
            device = parameter.device if kind == "entry" else torch.device("cpu")
            return _new(placed.shape, dtype, device)
        dtype = self._following(dtype, name)
        if isinstance(parameter, DTensor) and self._is_sharded(placed, name):
            return _empty_dtensor(placed, dtype, parameter)
        device = torch.device("cpu") if name == "step" and self._cpu_step else parameter.device
        return _new(placed.shape, dtype, device)

    def _following(self, stored: torch.dtype, name: str) -> torch.dtype:
        """The stored dtype, or the live parameter's for state that was of its parameter's dtype."""
        live = self._parameter.dtype
        floating = stored.is_floating_point and live.is_floating_point
        if not floating or name == "step" or stored != self._saved_dtype or stored == live:
            return stored
        self.rounds |= torch.promote_types(stored, live) != live
        return live


def _new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _empty_dtensor(placed: Placed, dtype: torch.dtype, like: DTensor) -> DTensor:
    """On the mesh of `like`; split as it is where shapes are equal, else along the dimensions that were split."""
    device = local_tensor(like).device
    if placed.shape == like.shape:
        local = _new(local_tensor(like).shape, dtype, device)
        return dtensor_from(local, placed.shape, like.device_mesh, like.placements)
    placements = tuple(_split(p, placed) for p in like.placements)
    part = local_shape(placed.shape, like.device_mesh, placements)
    local = _new(part, dtype, device)
    return dtensor_from(local, placed.shape, like.device_mesh, placements)


def _split(placement: Placement, placed: Placed) -> Placement:
    dim = getattr(placement, "dim", None)
    names = placed.placements or ()
    if dim is not None and dim < len(placed.shape) and f"S{dim}" in names:
        return Shard(dim)
    return Replicate()


def _install(
    optimizer: torch.optim.Optimizer,
    holder: torch.optim.Optimizer,
    states: Mapping[torch.Tensor, _StateBuilder | None],
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
