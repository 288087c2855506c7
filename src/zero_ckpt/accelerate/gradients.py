"""Gradients of an accumulation window that is not complete.

Within `accelerator.accumulate()`, gradients of the batches so far lie on each rank, and Accelerate alone loses them:
after a resume the window's step is made of what is left of it. Here each rank stores its own, and gets them back where
it holds the same parts again; so the window goes on as if never interrupted. At another world size they have no place:
the window begins anew, with a warning.

Under FSDP2, batches without communication leave whole gradients of this rank's own in records of FSDP2; batches with it
(`sync_each_batch`) leave reduced parts in `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from zero_ckpt.accelerate.base import ZeroBase
from zero_ckpt.core.binding import bound_names
from zero_ckpt.zero.inside import sharded_records

__all__ = ["capture_gradients", "gradients_fit", "restore_gradients"]

PART = "#part"
"""Marks the name of a gradient of which this rank has a part."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the gradients of one parameter lie. `record`: FSDP2's own, if it shards the parameter."""

    name: str
    parameter: Any
    record: Any = None


def capture_gradients(accelerator: ZeroBase) -> dict[str, torch.Tensor]:
    """Name -> what this rank has accumulated; empty outside of a window. References, not copies.

    Sharded models must be in their sharded state, as `capture_models` leaves them.
    """
    found: dict[str, torch.Tensor] = {}
    if accelerator.gradient_state.sync_gradients:
        return found
    for place in _places(accelerator):
        gradient = place.parameter.grad
        if isinstance(gradient, DTensor):
            found[place.name + PART] = gradient.to_local().detach()
        elif gradient is not None:
            found[place.name] = gradient.detach()
        whole = None if place.record is None else _accumulated(place.record)
        if whole is not None:
            found[place.name] = whole
    return found


def gradients_fit(accelerator: ZeroBase, gradients: Mapping[str, torch.Tensor]) -> bool:
    """Whether every one of these gradients has its place in the prepared models."""
    shapes: dict[str, torch.Size] = {}
    for place in _places(accelerator):
        shapes[place.name] = place.parameter.shape
        if isinstance(place.parameter, DTensor):
            shapes[place.name + PART] = place.parameter.to_local().shape
            if place.record is None:
                del shapes[place.name]
    return all(name in shapes and shapes[name] == g.shape for name, g in gradients.items())


@torch.no_grad()
def restore_gradients(accelerator: ZeroBase, gradients: Mapping[str, torch.Tensor]) -> None:
    """Continue the window with these gradients, which fit; without any, no window is open.

    Accelerate learns of the window only from its next batch, and a save before that would take it to be closed.
    """
    accelerator.gradient_state.sync_gradients = not gradients
    for place in _places(accelerator):
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


def _places(accelerator: ZeroBase) -> Iterator[_Place]:
    models = accelerator.zero_models()
    names = bound_names(models)
    for model in models.values():
        records = {id(record.sharded_param): record for record in sharded_records(model)}
        for parameter in model.parameters():
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
