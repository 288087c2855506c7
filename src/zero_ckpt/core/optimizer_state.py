"""One parameter's optimizer state: the tensors that a load fills, and the state that they make.

Owns where state lies (device, mesh, placements) and which dtype it gets. Promises: live state that fits is filled in
place, so that no second copy is held; the optimizer sees nothing of the rest before `state` is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from zero_ckpt.core.memory import prefer_huge_pages
from zero_ckpt.core.objects import decode_objects
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.reader import Request
from zero_ckpt.core.state_values import python_value, split_state_name

__all__ = ["StateBuilder"]


class StateBuilder:
    """Finds or allocates one parameter's state tensors, and turns them into its state when they are filled.

    State that the optimizer has already, of the stored dtype and shape, is filled in place: no second copy is held.
    State keeps its stored dtype, with one exception: state that was saved in its parameter's dtype takes that of the
    live parameter, since torch's optimizers do not mix them. `rounds`: whether values may lose precision by that.

    `live`, `fresh`: the reads that `add` asked for, into existing and into new memory. `begun`: state that the
    checkpoint lacks, which begins at zero in the shape and dtype of a stored one, named beside it.
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
        self.begun: Mapping[str, str] = {}
        self._saved_dtype = saved_dtype
        self._checkpoint, self._parameter, self._state = checkpoint, parameter, state
        self._rank, self._cpu_step, self._weights_only = rank, cpu_step, weights_only
        self._tensors: dict[str, torch.Tensor] = {}
        self._entries: dict[str, torch.Tensor] = {}
        self._keys: dict[str, str] = {}

    def add(self, name: str, key: str) -> None:
        """Restore the state called `name` (with its mark, as `step#int`) from the stored tensor `key`."""
        placed = self._checkpoint.placed("optim", key)
        base, kind = split_state_name(name)
        live = None if kind else self._fitting(placed, base)
        tensor = self._empty(placed, base, kind) if live is None else live
        if kind == "entry":
            self._entries[key] = tensor
        else:
            self._tensors[name], self._keys[base] = tensor, key
        local, box = local_part(key, tensor, layout_of(key, tensor), self._rank)
        if box is not None and box.numel:
            requests = self.fresh if live is None else self.live
            requests.append(Request("optim", key, placed, box, local))

    def _fitting(self, placed: Placed, name: str) -> torch.Tensor | None:
        """The live state tensor, when the stored one can take its place value by value."""
        value = self._state.get(name)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != placed.shape:
            return None
        if name == "step" and not self._cpu_step and value.device != self._parameter.device:
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
        return values | {name: torch.zeros_like(values[like]) for name, like in self.begun.items()}

    def _decoded(self, tensor: torch.Tensor, name: str) -> Any:
        entry = self._entries.__getitem__
        return decode_objects(
            tensor.numpy().tobytes(),
            entry,
            dtensor=entry,
            weights_only=self._weights_only,
            where=f"{self._checkpoint.path}: optimizer state '{self._keys[name].removesuffix('#json')}'",
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
    """A DTensor on the mesh of `like`: placed like it if it has its shape, else split only where it was when saved."""
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
