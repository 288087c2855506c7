"""Live models and optimizers <-> named tensors. Holds references, copies nothing, touches no file.

A model's keys are its `state_dict` keys without the prefixes that wrappers add (DistributedDataParallel,
`torch.compile`, activation checkpointing). Tied weights are stored once, under the first of their names. An
optimizer's state is named after its parameter: `encoder.0.weight/exp_avg`; Python values of the state become small
tensors whose names say what they were (`#int`, `#float`, `#bool`, `#none`, and `#json` for anything else, with the
tensors in it as `#entry/<path>`): under ZeRO-1 only one rank has them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.core.computed import LiveMemory, is_extra_state
from zero_ckpt.core.dtensors import local_tensor
from zero_ckpt.core.experts import Share
from zero_ckpt.core.naming import ParameterNames, dotted, naming_of, split_expert, whole_model
from zero_ckpt.core.own_state import own_state
from zero_ckpt.core.state_values import MARKS, add_value, split_state_name
from zero_ckpt.errors import ConfigurationError, StateMismatchError

__all__ = [
    "ModelState",
    "OptimizerState",
    "Snapshot",
    "by_parameter",
    "capture_model",
    "capture_models",
    "capture_optimizer",
    "group_names",
    "holder_of",
    "inferred_stage",
    "is_partitioned",
    "local_states",
    "names_in_groups",
]


@dataclass(slots=True)
class ModelState:
    """A model's live tensors by key; which of them are buffers or frozen; tied names; and non-tensor entries.

    `computed`: keys of entries, tensors or not, that a module has made for its state dict (see `core.computed`).
    `experts`: the lists of experts of which this rank has a share, by path.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    experts: dict[str, Share] = field(default_factory=dict)

    def add(self, other: ModelState, prefix: str) -> None:
        """Take in the state of another model, every key with `prefix` before it.

        Raises `ConfigurationError` when a key is taken already: one of the tensors would be lost.
        """
        taken = self.tensors.keys() | self.aliases.keys() | self.extra.keys()
        for key in map(prefix.__add__, [*other.tensors, *other.aliases, *other.extra]):
            if key in taken:
                raise ConfigurationError(
                    f"two models have a tensor '{key}', as the names of the models are put before those of their "
                    "tensors. Give the models other names."
                )
        self.tensors |= {prefix + k: v for k, v in other.tensors.items()}
        self.buffers |= {prefix + k for k in other.buffers}
        self.frozen |= {prefix + k for k in other.frozen}
        self.aliases |= {prefix + k: prefix + v for k, v in other.aliases.items()}
        self.extra |= {prefix + k: v for k, v in other.extra.items()}
        self.computed |= {prefix + k for k in other.computed}
        self.experts |= {prefix + k: v for k, v in other.experts.items()}


@dataclass(slots=True)
class OptimizerState:
    """`tensors`: "<prefix><fqn>/<name>" -> live tensor. `notice`: a warning of what is not saved, or "".

    `record`: class name, groups of FQNs with their options, and `rest`: see `core.own_state`.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    notice: str = ""


@dataclass(slots=True)
class Snapshot:
    """What one rank hands to a save: references to live state.

    `objects` of rank 0 are stored; tensors inside go with them, and DTensors inside are stored by all their ranks.
    `rank_objects` are every rank's own. `excluded`: frozen parameters left out on purpose. `notices`: what the user is
    told when all is committed.
    """

    model: dict[str, torch.Tensor] = field(default_factory=dict)
    optim: dict[str, torch.Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    rank_objects: dict[str, Any] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    aliases: dict[str, str] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    experts: dict[str, Share] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def capture_model(model: nn.Module) -> ModelState:
    """The model's state by key, as references. Non-persistent buffers are not part of it."""
    model = whole_model(model)
    naming = naming_of(model)
    state = ModelState(experts=dict(naming.experts))
    owners: dict[Any, str] = {}
    memory = LiveMemory(model)
    for raw, value in model.state_dict(keep_vars=True).items():
        key = naming.clean(raw)
        if not isinstance(value, torch.Tensor) or is_extra_state(key):
            _refuse_extra_state(key, state.experts)
            state.extra[key] = value
            if not is_extra_state(key):
                state.computed.add(key)
            continue
        if key in state.tensors or key in state.aliases:
            raise StateMismatchError(
                f"two tensors of the model are called '{key}' without what wrappers add ('{raw}' is one of them): one "
                "would be lost. Give one of their modules another name."
            )
        first = owners.setdefault(_identity(value), key)
        if first != key:
            state.aliases[key] = first
            continue
        state.tensors[key] = value
        if not memory.holds(value):
            state.computed.add(key)
        if id(value) in memory.buffers or not isinstance(value, nn.Parameter):
            state.buffers.add(key)
        elif not value.requires_grad:
            state.frozen.add(key)
    return state


def _refuse_extra_state(key: str, experts: Mapping[str, Share]) -> None:
    """Extra state is stored by rank 0, which has that of its own experts only."""
    found = split_expert(key, experts)
    if found is not None and experts[found[0]].count < experts[found[0]].total:
        raise StateMismatchError(
            f"'{key}': a module of an expert has extra state (get_extra_state), which cannot be stored while experts "
            "live on different ranks. Keep it in a buffer."
        )


def _identity(tensor: torch.Tensor) -> Any:
    """Equal for two entries that are one tensor: the same object, or the same view of the same memory."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def capture_models(models: Mapping[str, nn.Module]) -> ModelState:
    """Several models as one: keys are prefixed with "<name>.", but for a single model called ""."""
    state = ModelState()
    for name, model in models.items():
        state.add(capture_model(model), dotted(name))
    return state


def is_partitioned(optimizer: Any) -> bool:
    """Whether ranks divide an optimizer's state among them by parameters: a `ZeroRedundancyOptimizer`."""
    return hasattr(optimizer, "consolidate_state_dict")


def inferred_stage(models: Iterable[nn.Module], optimizers: Iterable[Any]) -> int:
    """The ZeRO stage that live state shows: 3 for DTensor parameters, 1 for a partitioned optimizer, else 0."""
    if any(isinstance(p, DTensor) for model in models for p in model.parameters()):
        return 3
    return 1 if any(map(is_partitioned, optimizers)) else 0


def holder_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose `state` this rank steps with: ZeroRedundancyOptimizer's local one, or itself."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def local_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(parameter, state) of every parameter whose state this rank holds, in the order of the groups."""
    holder = holder_of(optimizer)
    for group in holder.param_groups:
        for parameter in group["params"]:
            state = holder.state.get(parameter)
            if state:
                yield parameter, state


def names_in_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[int, str]:
    """id(parameter) -> FQN, of every parameter in the optimizer; one of no known model is named by its place."""
    return {
        id(p): names.get(id(p), f"param_groups.{g}.{i}")
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
    }


def group_names(
    optimizer: torch.optim.Optimizer, names: ParameterNames, fqn_of: Mapping[int, str]
) -> list[tuple[list[str], dict[str, Any]]]:
    """(FQNs, options) of every parameter group. With a rank's experts, those in their places on other ranks are listed.

    `fqn_of`: what `names_in_groups` gave.
    """
    groups = []
    for group in optimizer.param_groups:
        fqns = [fqn for p in group["params"] for fqn in names.on_all_ranks(fqn_of[id(p)])]
        groups.append((fqns, {k: v for k, v in group.items() if k != "params"}))
    return groups


def capture_optimizer(
    optimizer: torch.optim.Optimizer, names: ParameterNames, prefix: str = ""
) -> OptimizerState:
    """The optimizer's state by parameter name. Under ZeroRedundancyOptimizer, the local partition's.

    `names`: of all parameters. `prefix` keeps several optimizers apart.
    """
    fqn_of = names_in_groups(optimizer, names)
    groups = group_names(optimizer, names, fqn_of)
    state = OptimizerState(
        record={
            "class": type(holder_of(optimizer)).__name__,
            "groups": [{"params": fqns, "options": options} for fqns, options in groups],
        }
    )
    rest = own_state(holder_of(optimizer))
    if rest:
        state.record["rest"] = rest
    for parameter, values in local_states(optimizer):
        base = f"{prefix}{fqn_of[id(parameter)]}"
        for name, value in values.items():
            if not isinstance(name, str) or split_state_name(name)[1]:
                raise StateMismatchError(
                    f"the optimizer keeps state of '{fqn_of[id(parameter)]}' under {name!r}, which would come back "
                    f"under another name: expected a text that does not end in {', '.join(MARKS)}"
                )
            _refuse_part(fqn_of[id(parameter)], parameter, name, value)
            add_value(state.tensors, f"{base}/{name}", value)
    state.notice = _unsaved(holder_of(optimizer))
    return state


def _refuse_part(fqn: str, parameter: Any, name: str, value: Any) -> None:
    """Raises `StateMismatchError` for a plain tensor that is this rank's part of a sharded parameter's state.

    Nothing marks it as a part, so that one rank's would be stored as the whole.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return
    part = local_tensor(parameter).shape
    if isinstance(value, torch.Tensor) and value.shape == part != parameter.shape:
        raise StateMismatchError(
            f"the optimizer keeps '{name}' of '{fqn}' as a plain tensor of shape {list(part)}, that of this rank's "
            f"part of the parameter, which is a DTensor of shape {list(parameter.shape)}: where the other parts are "
            "is not known. Make it a DTensor, too (torch.zeros_like(parameter))"
        )


def _unsaved(optimizer: torch.optim.Optimizer) -> str:
    """A warning of state that belongs to no parameter, and so has no name in a checkpoint; "" when there is none."""
    others = [repr(key) for key in optimizer.state if not isinstance(key, torch.Tensor)]
    if not others:
        return ""
    return (
        f"the state that {type(optimizer).__name__} keeps for no parameter ({', '.join(others[:3])}"
        f"{', ...' if len(others) > 3 else ''}) is not saved: a load leaves it as it is. Put it into the client state."
    )


def by_parameter(
    keys: Iterable[str], prefix: str, fqns: Container[str]
) -> dict[str, dict[str, str]]:
    """FQN -> state name -> stored key. FQNs and state names may hold slashes: the longest known FQN wins."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        if not key.startswith(prefix):
            continue
        rest = key[len(prefix) :]
        end = rest.rfind("/")
        while end > 0 and rest[:end] not in fqns:
            end = rest.rfind("/", 0, end)
        if end > 0:
            found.setdefault(rest[:end], {})[rest[end + 1 :]] = key
    return found
