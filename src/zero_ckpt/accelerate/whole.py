"""Loads whole state dicts, which Accelerate or a Trainer wrote, into models that we have sharded.

Their own code reads the files, on every rank, and gives whole tensors to `load_state_dict`. The hooks here cut them to
this rank's parts. No communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zero_ckpt.core.naming import naming_of
from zero_ckpt.core.parts import placed_like

__all__ = ["shard_state_when_loaded", "sharding_what_is_loaded"]


@contextmanager
def sharding_what_is_loaded(
    models: Iterable[nn.Module], optimizers: Iterable[Optimizer]
) -> Iterator[None]:
    """Inside, `load_state_dict` of these takes whole tensors, and names with or without what wrappers add."""
    with ExitStack() as hooks:
        for model in models:
            _let_take_whole(model, hooks)
        for optimizer in optimizers:
            hooks.callback(optimizer.register_load_state_dict_pre_hook(_shard_state).remove)
        yield


def shard_state_when_loaded(optimizer: Optimizer) -> None:
    """Let the next `load_state_dict` of this optimizer take whole tensors for parameters that are sharded."""

    def shard(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        hook.remove()
        return _shard_state(optimizer, state)

    hook = optimizer.register_load_state_dict_pre_hook(shard)


def _let_take_whole(model: nn.Module, hooks: ExitStack) -> None:
    live = model.state_dict()
    naming = naming_of(model)
    names = {naming.clean(name): name for name in live}
    ties = _ties(model)

    def shard(_: nn.Module, loaded: dict[str, Any], *__: Any) -> None:
        """Cut what is loaded, in place, under the names that the model has now. torch itself tells of other shapes."""
        for key in list(loaded):
            value = loaded.pop(key)
            name = key if key in live else names.get(_without_wrappers(key), key)
            target = live.get(name)
            if isinstance(target, torch.Tensor) and getattr(value, "shape", None) == target.shape:
                value = placed_like(value, target)
            loaded[name] = value
        for tied in ties:  # of which a file may hold one
            values = [loaded[name] for name in tied if name in loaded]
            loaded.update({name: values[0] for name in tied if values and name not in loaded})

    def show_no_memory(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
        """Show stand-ins for sharded tensors: safetensors asks for addresses, which DTensors do not have."""
        for name, value in state.items():
            if isinstance(value, DTensor):
                state[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")

    hooked: Any = model  # whose methods are untyped in torch
    hooks.callback(hooked.register_load_state_dict_pre_hook(shard).remove)
    hooks.callback(hooked.register_state_dict_post_hook(show_no_memory).remove)


def _ties(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]


def _without_wrappers(key: str) -> str:
    """The name without what DistributedDataParallel and `torch.compile` put into it."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _shard_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=False))
    parts = {
        number: {name: placed_like(value, by_number[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}
