"""A checkpoint dict whole on rank 0, as DDP has it: for users' own `CheckpointIO` plugins.

Such a plugin writes one file from one process, so nothing can be left in parts. Tensors travel over
the training's process group, to host memory of rank 0: the price of the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

__all__ = ["gather_content"]


def gather_content(checkpoint: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Collective. The dict with whole tensors, and optimizer state by number as torch has it; on other ranks `{}`."""
    content = dict(checkpoint)
    states = content.pop("optimizer_states", None)
    whole: dict[str, Any] = _whole(content, rank, {})
    if states is not None:
        whole["optimizer_states"] = [_optimizer(state, rank, world_size) for state in states]
    return whole if rank == 0 else {}


def _whole(value: Any, rank: int, done: dict[int, Any]) -> Any:
    """Every rank walks the same tree: gathering a DTensor is collective."""
    if isinstance(value, DTensor):
        if id(value) not in done:
            full = value.full_tensor()
            done[id(value)] = full.detach().cpu() if rank == 0 else None
        return done[id(value)]
    if isinstance(value, dict):
        return {key: _whole(each, rank, done) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_whole(each, rank, done) for each in value)
    return value


def _optimizer(state: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    if "param_groups" not in state:
        return dict(state)
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    merged: dict[Any, Any] = {}
    for part in _parts(state["state"], rank, world_size):
        merged.update(part)
    by_number = {numbers[name]: merged[name] for name in names if name in merged}
    return {"state": by_number, "param_groups": groups}


def _parts(states: Mapping[str, Any], rank: int, world_size: int) -> list[Any]:
    """All ranks' states, on rank 0: sharded tensors are put together, whole ones sent by the ranks that own them."""
    sharded = any(isinstance(v, DTensor) for values in states.values() for v in values.values())
    kinds: list[Any] = [None] * world_size
    dist.all_gather_object(kinds, sharded)
    if any(kinds) or world_size == 1:
        return [_whole(states, rank, {})]
    own = {name: {k: _on_cpu(v) for k, v in values.items()} for name, values in states.items()}
    received: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(own, received)
    return received or []


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
