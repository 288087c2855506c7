"""Stored weights into a live module, through the module's own `load_state_dict`.

So strictness, error texts, hooks, extra state and overridden methods are those of a plain run. Each
rank reads only its part of what is sharded. All reads come first: nothing is changed by a damaged
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.dtensors import layout_of, local_part
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.naming import is_elsewhere, naming_of
from zero_ckpt.core.outcome import LoadReport
from zero_ckpt.core.parts import part_like
from zero_ckpt.core.reader import Request
from zero_ckpt.errors import StateMismatchError
from zero_ckpt.zero.generic import users_class

__all__ = ["UnfitWeightsError", "load_weights"]


class UnfitWeightsError(StateMismatchError, RuntimeError):
    """What torch's `load_state_dict` raised, with the checkpoint that the weights came from."""


Reads = Callable[[list[Request]], None]


def load_weights(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    rank: int,
    read: Reads,
    *,
    strict: bool,
) -> LoadReport:
    """Load `state_dict`, whose values may be lazy tensors of `checkpoint`, whole tensors or parts.

    Returns what did not match, by the module's own names. `read` fills requests, on every rank or
    on none. Raises `UnfitWeightsError`, and whatever else `module.load_state_dict` raises.
    """
    live = module.state_dict()
    naming = naming_of(module)
    raw_names = {naming.clean(raw): raw for raw in live}
    named = {
        raw_names.get(key, key): value
        for key, value in state_dict.items()
        if not is_elsewhere(key, naming.experts)
    }
    values, requests = _laid_out(named, live, checkpoint, rank)
    given = set(values)
    excluded = checkpoint.manifest.excluded if checkpoint is not None else ()
    for raw in _with_tied(module, [raw_names.get(key, key) for key in excluded]):
        if raw in live:
            values.setdefault(raw, live[raw])  # frozen, and left out of the save on purpose
    read(requests)
    try:
        with _undone_on_error(live, values, strict):
            module.load_state_dict(_with_metadata(values, live), strict=strict)
    except RuntimeError as error:
        unfit = _unfit(error, module, checkpoint, helps=strict and not _misshapen(live, values))
        if unfit is None:
            raise
        raise unfit from error
    return LoadReport(
        missing=tuple(key for key in live if key not in values),
        unexpected=tuple(key for key in values if key not in live),
        excluded=tuple(key for key in values if key not in given),
    )


def _with_tied(module: nn.Module, names: Collection[str]) -> list[str]:
    """`names`, and the other names of the parameters that they belong to."""
    if not names:
        return []
    parameters = dict(module.named_parameters(remove_duplicate=False))
    meant = {id(parameters[name]) for name in names if name in parameters}
    return [*names, *(name for name, p in parameters.items() if id(p) in meant)]


def _unfit(
    error: RuntimeError, module: nn.Module, checkpoint: Checkpoint | None, *, helps: bool
) -> UnfitWeightsError | None:
    """The error to raise for torch's refusal of a state dict; None for any other error.

    `helps`: whether the load would succeed without strictness.
    """
    _, is_torchs, reasons = str(error).partition("Error(s) in loading state_dict for ")
    if not is_torchs:
        return None
    source = "the checkpoint" if checkpoint is None else checkpoint.path
    kind = type(module)
    reasons = users_class(kind).__name__ + reasons.removeprefix(kind.__name__)
    remedy = " To load what matches, set strict_loading = False on the module." if helps else ""
    return UnfitWeightsError(
        f"{source} does not fit the model. {is_torchs}{reasons}\nNothing was loaded.{remedy}"
    )


def _laid_out(
    state_dict: Mapping[str, Any], live: Mapping[str, Any], checkpoint: Checkpoint | None, rank: int
) -> tuple[dict[str, Any], list[Request]]:
    """(values laid out like the live ones, tied ones sharing one, the requests that fill those not read yet)."""
    requests: list[Request] = []
    made: dict[int, Any] = {}
    for name, value in state_dict.items():
        if id(value) not in made:
            made[id(value)] = _reading(value, live.get(name), checkpoint, rank, requests)
    return {name: made[id(value)] for name, value in state_dict.items()}, requests


def _reading(
    value: Any,
    target: Any,
    checkpoint: Checkpoint | None,
    rank: int,
    requests: list[Request],
) -> Any:
    """`value` laid out like `target`. For a lazy one a new tensor, and a request that fills it is appended."""
    if not isinstance(value, LazyTensor):
        return _like(value, target)
    if value.is_read or checkpoint is None or value.source is not checkpoint:
        return _like(value.materialize(), target)
    shape = tuple(value.shape)
    if not isinstance(target, DTensor) or tuple(target.shape) != shape:
        whole = torch.empty(shape, dtype=value.dtype, device="cpu")
        requests.append(checkpoint.request(value.role, value.key, whole))
        return whole
    part = torch.empty_like(target, dtype=value.dtype)
    local, box = local_part(value.key, part, layout_of(value.key, part), rank)
    if box is not None and box.numel:
        requests.append(checkpoint.request(value.role, value.key, local, box))
    return part


def _like(value: Any, target: Any) -> Any:
    """A whole tensor cut to this rank's part, where the target is sharded."""
    if not isinstance(target, DTensor) or not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, DTensor) or value.shape != target.shape:
        return value
    return part_like(value, target)


def _misshapen(live: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return any(
        getattr(value, "shape", None) != getattr(live[key], "shape", None)
        for key, value in values.items()
        if key in live
    )


@contextmanager
def _undone_on_error(
    live: Mapping[str, Any], values: Mapping[str, Any], strict: bool
) -> Iterator[None]:
    """Inside, an error of `load_state_dict` leaves the module as it was: torch copies what fits before it raises.

    Copies are made only where an error is likely, and not certain: a hook may still make the two fit.
    """
    if not _misshapen(live, values) and (live.keys() == values.keys() or not strict):
        yield
        return
    before = {k: (v, v.clone()) for k, v in live.items() if isinstance(v, torch.Tensor)}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, copy in before.values():
                tensor.copy_(copy)
        raise


def _with_metadata(values: dict[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """Let modules see the format versions of their own state, which checkpoints do not keep."""

    class StateDict(dict[str, Any]):
        _metadata = getattr(live, "_metadata", None)

    return StateDict(values)
