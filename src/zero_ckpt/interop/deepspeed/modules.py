"""A module's own state dict: what it holds beside the optimizer's weights, and under which names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zero_ckpt.interop.deepspeed.column import Column
from zero_ckpt.interop.deepspeed.tensors import StoredTensor, Tensor

__all__ = ["add_module", "parameters_of", "strip_compiled"]

Tree = Mapping[str, Any]
Module = Mapping[str, StoredTensor]


def add_module(column: Column, model: Tree, module: Module, *, sharded: bool) -> None:
    """Add buffers, frozen parameters and tied names of `module`.

    `model`: the tree of the model file. `sharded`: whether it is of stage 3, where parameters there are empty.
    """
    listed = model.get("buffer_names")
    buffers = {name for name in listed if name in module} if isinstance(listed, list) else set()
    column.order = list(module)
    column.aliases = _aliases(module, model.get("shared_params"), sharded=sharded)
    for name, kept in list(column.aliases.items()):
        if name in column.masters and kept not in column.masters:
            del column.aliases[name]
            column.aliases[kept] = name
    for name, stored in module.items():
        if name in column.masters or name in column.aliases or name in column.module:
            continue
        if not sharded or name in buffers:
            column.module[name] = Tensor.of_stored(stored)
    column.buffers = buffers - column.aliases.keys()
    column.frozen = _frozen(column, model.get("frozen_param_shapes"))


def _frozen(column: Column, listed: Any) -> set[str]:
    """Parameters that are not stepped: those that are listed, else all that no group has."""
    left = set(column.module) - column.buffers
    left -= {name for group in column.groups for name in group.names}
    if isinstance(listed, dict):
        return left & set(listed)
    return set() if column.problem and not column.masters else left


def parameters_of(model: Tree, module: Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that an optimizer may step, in order; of tied ones the first."""
    buffers = model.get("buffer_names")
    left_out = set(buffers) if isinstance(buffers, list) else set()
    left_out |= _aliases(module, None, sharded=False).keys()
    return {name: stored.shape for name, stored in module.items() if name not in left_out}


def _aliases(module: Module, shared: Any, *, sharded: bool) -> dict[str, str]:
    """Tied name -> the name that the tensor is stored under: what is recorded, and equal memory.

    DeepSpeed takes all empty tensors for one; they are not.
    """
    found: dict[str, str] = {}
    for name, kept in shared.items() if isinstance(shared, dict) else ():
        both = name in module and kept in module and name != kept
        if both and (sharded or (module[name].shape == module[kept].shape and module[name].numel)):
            found[name] = kept
    owners: dict[Any, str] = {}
    for name, stored in module.items():
        if name not in found and stored.numel:
            first = owners.setdefault(stored.memory, name)
            if first != name:
                found[name] = first
    return found


_COMPILED = "_orig_mod."


def strip_compiled(whole: Column) -> None:
    """Take out the prefix that all names have when a model was compiled before it was given to DeepSpeed."""
    if not whole.order or not all(name.startswith(_COMPILED) for name in whole.order):
        return

    def cut(name: str) -> str:
        return name.removeprefix(_COMPILED)

    whole.order = [cut(name) for name in whole.order]
    whole.masters = {cut(name): value for name, value in whole.masters.items()}
    whole.module = {cut(name): value for name, value in whole.module.items()}
    whole.states = {cut(name): value for name, value in whole.states.items()}
    whole.aliases = {cut(name): cut(kept) for name, kept in whole.aliases.items()}
    whole.buffers = {cut(name) for name in whole.buffers}
    whole.frozen = {cut(name) for name in whole.frozen}
    for group in whole.groups:
        group.names = [cut(name) for name in group.names]
