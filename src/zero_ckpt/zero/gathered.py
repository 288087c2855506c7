"""Units that stay gathered from the forward to the backward pass, and no longer than that.

All units of stage 2, and the root's own group at stage 3 (it is needed first in the backward pass, and
a root may use its parameters after it has called itself). While gathered, a module shows whole copies
of its parameters. When no backward pass follows they would stay: an optimizer step, a load or a weight
swap then changes the sharded parameters, and the next forward pass would silently run on old copies.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["is_kept_gathered", "keep_gathered", "reshard"]

# How many forward passes of the unit are running: a Lightning step calls its module within it.
_running: WeakKeyDictionary[FSDPModule, int] = WeakKeyDictionary()


def keep_gathered(unit: nn.Module) -> None:
    """Guard a unit that does not reshard after its forward pass.

    From now on, what it gathers outlives neither a forward pass without gradients nor the step of an
    optimizer (of any optimizer: resharding what is not gathered costs nothing).
    """
    assert isinstance(unit, FSDPModule)
    assert isinstance(unit, nn.Module)
    eager: Any = torch.compiler.disable  # untyped in torch
    unit.register_forward_pre_hook(eager(_enter))
    unit.register_forward_hook(eager(_leave), always_call=True)
    _running[unit] = 0
    _watch_optimizers()


def is_kept_gathered(unit: nn.Module) -> bool:
    """Whether this unit stays gathered between its forward and its backward pass."""
    return isinstance(unit, FSDPModule) and unit in _running


def reshard(module: nn.Module) -> None:
    """Free whatever is gathered under `module`, so that its parameters are the sharded ones.

    No communication. Needed before parameters are read or written outside of forward and backward; not
    allowed within them.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            _reshard(submodule)


def _reshard(unit: FSDPModule) -> None:
    if unit in _running:
        _running[unit] = 0  # a forward pass that was interrupted has not been counted down
    unit.reshard()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_reshard_after_step)


def _reshard_after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for unit in _running:
        _reshard(unit)


def _enter(unit: FSDPModule, args: Any) -> None:
    _running[unit] += 1


def _leave(unit: FSDPModule, args: Any, output: Any) -> None:
    _running[unit] = max(0, _running[unit] - 1)
    if not _running[unit] and not torch.is_grad_enabled():
        unit.reshard()
