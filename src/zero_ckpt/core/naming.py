"""What live tensors are called in a checkpoint: their qualified names without what wrappers add, experts by number.

Wrappers (DistributedDataParallel, `torch.compile`, activation checkpointing) put themselves between a module and its
parent. A rank that holds experts 2 and 3 of a layer has them as entries 0 and 1 of its list; in a checkpoint they are 2
and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zero_ckpt.core.experts import Share, share_of

__all__ = [
    "Naming",
    "ParameterNames",
    "dotted",
    "innermost",
    "is_elsewhere",
    "local_name",
    "naming_of",
    "parameter_names",
    "split_expert",
    "whole_model",
]

# Child names of wrappers; an activation wrapper removes its own from the keys of `state_dict`.
_ACTIVATION_CHILD = "_checkpoint_wrapped_module"
_WRAPPER_CHILDREN = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": _ACTIVATION_CHILD,
    "OffloadWrapper": _ACTIVATION_CHILD,
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def dotted(name: str) -> str:
    """What the names of everything in the module or model `name` start with; "" when it has no name itself."""
    return f"{name}." if name else ""


@dataclass(frozen=True, slots=True)
class Naming:
    """How a model's names become those in a checkpoint.

    `wrappers`: prefixes to take out, longest first: the paths under which wrappers hold the real module, such as
    `module.` or `0._orig_mod.`. `experts`: path of a declared list of experts, with a dot behind it -> `Share`.
    """

    wrappers: tuple[str, ...] = ()
    experts: Mapping[str, Share] = field(default_factory=dict)

    def clean(self, name: str) -> str:
        """What the checkpoint calls the tensor that this rank calls `name`."""
        name = _without_wrappers(name, self.wrappers)
        return _renumbered(name, self.experts) if self.experts else name


def naming_of(model: nn.Module) -> Naming:
    wrappers = tuple(_wrapper_prefixes(model))
    return Naming(wrappers, _shares(model, wrappers))


def _wrapper_prefixes(model: nn.Module) -> list[str]:
    """Every prefix to take out, as `named_parameters` has it and, where that differs, as `state_dict` does."""
    found: set[str] = set()
    activation: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        child = _wrapped_child(module)
        if child is not None:
            prefix = f"{name}.{child}." if name else f"{child}."
            found |= {prefix, _without_wrappers(prefix, activation)}
            if child == _ACTIVATION_CHILD:
                activation.insert(0, prefix)
    return sorted(found, key=len, reverse=True)


def _wrapped_child(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the real module; None for any other module."""
    for kind in type(module).__mro__[:-2]:
        child = _WRAPPER_CHILDREN.get(kind.__name__)
        if child is not None and kind.__module__.startswith("torch."):
            return child
    return None


def innermost(model: nn.Module) -> nn.Module:
    """The module inside the wrappers around it."""
    while (child := _wrapped_child(model)) is not None:
        model = getattr(model, child)
    return model


def whole_model(model: nn.Module) -> nn.Module:
    """The model whose own `state_dict` counts: a replica's or a compiled model's wrapper does not ask an override."""
    while (child := _wrapped_child(model)) in ("module", "_orig_mod"):
        model = getattr(model, child)
    return model


def _without_wrappers(name: str, prefixes: Iterable[str]) -> str:
    for prefix in prefixes:
        if name.startswith(prefix):
            head = prefix[:-1].rpartition(".")[0]
            name = (f"{head}." if head else "") + name[len(prefix) :]
    return name


def _shares(model: nn.Module, wrappers: Iterable[str]) -> dict[str, Share]:
    found: dict[str, Share] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        share = share_of(module) if isinstance(module, nn.ModuleList) else None
        if share is not None:
            path = dotted(name)
            found[_without_wrappers(path, wrappers)] = share
    return found


def _renumbered(name: str, experts: Mapping[str, Share]) -> str:
    """`name`, with the local number of an expert replaced by its number in the layer."""
    found = split_expert(name, experts)
    if found is None:
        return name
    path, number, rest = found
    return f"{path}{experts[path].first + number}{rest}"


def split_expert(name: str, experts: Mapping[str, Any]) -> tuple[str, int, str] | None:
    """(path of the list, expert's number, what follows) of an expert's tensor; None for any other."""
    if not experts:
        return None
    if "" in experts:
        end = 0
    else:
        end = name.find(".") + 1
        while end and name[:end] not in experts:
            end = name.find(".", end) + 1
        if not end:
            return None
    number, dot, rest = name[end:].partition(".")
    return (name[:end], int(number), dot + rest) if number.isdecimal() else None


def is_elsewhere(name: str, experts: Mapping[str, Share]) -> bool:
    """Whether a tensor of a checkpoint belongs to an expert that another rank has."""
    found = split_expert(name, experts)
    if found is None:
        return False
    share = experts[found[0]]
    return found[1] < share.total and found[1] not in share.own


def local_name(name: str, experts: Mapping[str, Share]) -> str | None:
    """What this rank calls the tensor `name` of a checkpoint; None when it belongs to an expert of another rank."""
    if is_elsewhere(name, experts):
        return None
    found = split_expert(name, experts)
    if found is None or found[1] not in experts[found[0]].own:
        return name
    path, number, rest = found
    return f"{path}{number - experts[path].first}{rest}"


class ParameterNames(dict[int, str]):
    """id(parameter) -> FQN. `experts`: see `Naming`."""

    def __init__(
        self, names: Mapping[int, str] | None = None, experts: Mapping[str, Share] | None = None
    ) -> None:
        super().__init__(names or {})
        self.experts = dict(experts or {})

    def on_all_ranks(self, fqn: str) -> list[str]:
        """The names of the parameters in this place on all ranks: those of different experts, or `fqn` alone."""
        found = split_expert(fqn, self.experts)
        if found is None:
            return [fqn]
        path, number, rest = found
        return [f"{path}{peer}{rest}" for peer in self.experts[path].peers(number)]


def parameter_names(model: nn.Module) -> ParameterNames:
    """id(parameter) -> its first FQN: without what wrappers add, and with experts' numbers in their layers."""
    naming = naming_of(model)
    names = {id(p): naming.clean(name) for name, p in model.named_parameters()}
    return ParameterNames(names, naming.experts)
