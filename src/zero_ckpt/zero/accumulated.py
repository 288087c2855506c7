"""Gradients of an accumulation window that is not complete: what a rank has of them, and giving it back.

They lie on each rank, and are its own. Under FSDP2, batches without communication leave whole gradients in records of
FSDP2; batches with it leave reduced parts in `.grad`. A rank that holds the same parts again gets them back, and the
window goes on as if never interrupted; at another world size they have no place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.zero.inside import sharded_records

__all__ = ["accumulated_gradients", "gradients_fit", "put_gradients"]

PART = "#part"
"""Marks the name of a gradient of which this rank has a part."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the gradients of one parameter lie. `record`: FSDP2's own, if it shards the parameter."""

    name: str
    parameter: Any
    record: Any = None


def accumulated_gradients(
    models: Iterable[nn.Module], names: Mapping[int, str]
) -> dict[str, torch.Tensor]:
    """Name -> what this rank has accumulated. References, not copies.

    names: of the parameters that are asked for, by id.

    Sharded models must be in their sharded state, as `state_dict` leaves them.
    """
    found: dict[str, torch.Tensor] = {}
    for place in _places(models, names):
        gradient = place.parameter.grad
        if isinstance(gradient, DTensor):
            found[place.name + PART] = gradient.to_local().detach()
        elif gradient is not None:
            found[place.name] = gradient.detach()
        whole = None if place.record is None else _accumulated(place.record)
        if whole is not None:
            found[place.name] = whole
    return found


def gradients_fit(
    models: Iterable[nn.Module], names: Mapping[int, str], gradients: Mapping[str, torch.Tensor]
) -> bool:
    """Whether every one of these gradients has its place in the models."""
    shapes: dict[str, torch.Size] = {}
    for place in _places(models, names):
        shapes[place.name] = place.parameter.shape
        if isinstance(place.parameter, DTensor):
            shapes[place.name + PART] = place.parameter.to_local().shape
            if place.record is None:
                del shapes[place.name]
    return all(name in shapes and shapes[name] == g.shape for name, g in gradients.items())


@torch.no_grad()
def put_gradients(
    models: Iterable[nn.Module], names: Mapping[int, str], gradients: Mapping[str, torch.Tensor]
) -> None:
    """Let these gradients, which fit, be all that has been accumulated."""
    for place in _places(models, names):
        parameter, record = place.parameter, place.record
        part, whole = gradients.get(place.name + PART), gradients.get(place.name)
        parameter.grad = None
        if part is not None:
            local = part.to(parameter.to_local().device)
            parameter.grad = DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        if record is not None:
            if hasattr(record, "_unsharded_param"):
                record._unsharded_param.grad = None
            record.unsharded_accumulated_grad = None if whole is None else whole.to(record.device)
        elif whole is not None:
            parameter.grad = whole.to(parameter.device)


def _places(models: Iterable[nn.Module], names: Mapping[int, str]) -> Iterator[_Place]:
    for model in models:
        records = {id(record.sharded_param): record for record in sharded_records(model)}
        for parameter in model.parameters():
            if id(parameter) in names:
                yield _Place(names[id(parameter)], parameter, records.get(id(parameter)))


def _accumulated(record: Any) -> torch.Tensor | None:
    """The gradient that passes without communication have left in FSDP2's record: whole, and this rank's only."""
    kept = record.unsharded_accumulated_grad
    if kept is None and hasattr(record, "_unsharded_param"):
        kept = record._unsharded_param.grad
    if kept is None:
        return None
    local: torch.Tensor = kept.to_local() if isinstance(kept, DTensor) else kept
    return local.detach()
