"""Entries that a module makes when its state dict is asked for: a metric's counters, a quantized layer's scale.

They are copies or plain values: filling them changes nothing. Only the module's own `load_state_dict` knows where they
belong, so it gets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.core.dtensors import TORCH_DTYPES, local_tensor
from zero_ckpt.core.naming import dotted, innermost, naming_of
from zero_ckpt.core.planner import Placed

__all__ = ["EXTRA_STATE", "LiveMemory", "empty_like_computed", "is_extra_state", "set_computed"]

EXTRA_STATE = "_extra_state"
"""The last part of the key under which a module keeps what `get_extra_state` returns."""

_PLAIN = (torch.Tensor, nn.Parameter)


def is_extra_state(key: str) -> bool:
    return key.rpartition(".")[2] == EXTRA_STATE


class LiveMemory:
    """The parameters and buffers of a model, and the memory that they lie in."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = {id(buffer) for buffer in model.buffers()}
        self._own = self.buffers | {id(parameter) for parameter in model.parameters()}
        self._model = model
        self._memory: set[int] | None = None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether an entry of the state dict is one of them, or a view of one; True for what is in no plain memory."""
        if id(tensor) in self._own:
            return True
        local = local_tensor(tensor)
        if type(local) not in _PLAIN or local.layout != torch.strided or local.is_meta:
            return True
        if self._memory is None:
            live = map(local_tensor, (*self._model.parameters(), *self._model.buffers()))
            found = {_memory_of(t) for t in live if type(t) in _PLAIN}
            self._memory = found - {0}  # which is where all empty ones are
        return _memory_of(local) in self._memory


def _memory_of(tensor: torch.Tensor) -> int:
    if tensor.layout != torch.strided or tensor.is_meta:
        return 0
    return tensor.untyped_storage().data_ptr()


def empty_like_computed(placed: Placed, live: torch.Tensor | None) -> torch.Tensor:
    """For the stored tensor, which may have another shape than the live one; sharded where that is, on its device."""
    dtype = TORCH_DTYPES[placed.dtype]
    if isinstance(live, DTensor) and live.shape == placed.shape:
        return torch.empty_like(live, dtype=dtype)
    return torch.empty(placed.shape, dtype=dtype, device="cpu" if live is None else live.device)


def set_computed(
    models: Mapping[str, nn.Module], values: Mapping[str, Any], aliases: Mapping[str, str]
) -> None:
    """Give each model the values, by their names in the checkpoint, through its own `load_state_dict`.

    `aliases`: other name -> name in `values`. A module that is in several places takes what it is given last.
    """
    values = {**values, **{a: values[first] for a, first in aliases.items() if first in values}}
    for name, model in models.items():
        prefix = dotted(name)
        mine = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        if mine:
            _give(innermost(model), mine)


def _give(model: nn.Module, values: Mapping[str, Any]) -> None:
    """The other entries are the live ones: a module may look for all of its own at once."""
    state, naming = model.state_dict(), naming_of(model)
    raw_names = {naming.clean(raw): raw for raw in state}
    for raw in [raw for raw in state if is_extra_state(raw)]:
        del state[raw]
    for key, value in values.items():
        raw = raw_names.get(key, key)
        state[raw] = value
    model.load_state_dict(state, strict=False)
