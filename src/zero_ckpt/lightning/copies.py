"""Copies of the model that callbacks keep, sharded like the model.

Weight averaging (`WeightAveraging`, `EMAWeightAveraging`, `StochasticWeightAveraging` and
callbacks like them) deep-copies the module in its `setup`, before the strategy shards it, and then
pairs the copy's parameters with the model's, one by one. Here each parameter of the copy gets the
placement of its counterpart, so that the pairs fit and every rank keeps only its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from zero_ckpt.core.parts import part_like

__all__ = ["shard_copies"]

_Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def shard_copies(callbacks: Iterable[Any], model: nn.Module) -> None:
    """Shard every copy of `model` that an attribute of a callback holds. No communication.

    Each rank keeps its slice of its own copy, so copies must be equal on all ranks; where they
    are random they must be overwritten before they are read, as averages are by their first update.
    """
    for copy, averaged in _copies(callbacks, model):
        _shard_like(copy, model)
        if averaged is not None:
            _average_by_kind(averaged)


def _copies(
    callbacks: Iterable[Any], model: nn.Module
) -> Iterator[tuple[nn.Module, AveragedModel | None]]:
    shapes = _shapes(model)
    for callback in callbacks:
        for value in vars(callback).values():
            averaged = value if isinstance(value, AveragedModel) else None
            copy = value.module if isinstance(value, AveragedModel) else value
            if isinstance(copy, nn.Module) and copy is not model and _shapes(copy) == shapes:
                yield copy, averaged


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _shard_like(copy: nn.Module, model: nn.Module) -> None:
    done: dict[nn.Parameter, nn.Parameter] = {}
    owners = dict(copy.named_modules(remove_duplicate=False))
    for name, like in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        whole = owners[path]._parameters[leaf]
        if whole is None or isinstance(whole, DTensor) or not isinstance(like, DTensor):
            continue
        if whole not in done:
            done[whole] = _part_like(whole, like)
        owners[path]._parameters[leaf] = done[whole]


def _part_like(whole: nn.Parameter, like: DTensor) -> nn.Parameter:
    return nn.Parameter(part_like(whole, like), requires_grad=whole.requires_grad)


def _average_by_kind(averaged: AveragedModel) -> None:
    """Let the averaging function see plain tensors and DTensors apart: torch's do not mix them."""
    kinds = {isinstance(parameter, DTensor) for parameter in averaged.module.parameters()}
    several = averaged.multi_avg_fn
    if len(kinds) < 2 or (several is None and averaged.avg_fn is not None):
        return
    default: Any = get_swa_multi_avg_fn  # untyped in torch
    whole = several or default()

    def average(copies: _Tensors, live: _Tensors, count: Any) -> None:
        for kind in (True, False):
            pairs = [p for p in zip(copies, live, strict=True) if isinstance(p[0], DTensor) is kind]
            if pairs:
                whole([copy for copy, _ in pairs], [value for _, value in pairs], count)

    averaged.multi_avg_fn = average
