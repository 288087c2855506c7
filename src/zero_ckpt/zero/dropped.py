"""Gradients of a sharded model that are given up: those of passes that raised, or that `zero_grad` is to clear.

Passes that reduce nothing leave whole gradients inside of FSDP2, where `zero_grad` of an optimizer does not see them.

FSDP2 also ends each backward pass in a callback, which it queues once per pass. When the pass raises (out of memory, a
user's error) the callback is gone, and FSDP2 still believes it to be queued: no later pass would be ended, and
parameters whose gradients are reduced there, such as embeddings, would silently stay as they are.
DistributedDataParallel refuses to go on after such an error; here only the gradients of the failed pass are lost.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from zero_ckpt.zero.gathered import reshard
from zero_ckpt.zero.inside import reset_passes, sharded_records

__all__ = ["drop_gradients", "drop_with_zero_grad", "recover_from_failures"]


def drop_gradients(module: nn.Module, parameters: Collection[int] | None = None) -> None:
    """Forget the gradients that passes without communication have left. `parameters`: ids; only those of these."""
    for record in sharded_records(module):
        if parameters is None or id(record.sharded_param) in parameters:
            record.unsharded_accumulated_grad = None
            if hasattr(record, "_unsharded_param"):
                record._unsharded_param.grad = None


def drop_with_zero_grad(optimizer: Optimizer, module: nn.Module) -> None:
    """From now on, `zero_grad` of this optimizer also drops the gradients of its parameters inside `module`."""
    given: Any = optimizer
    own = given.zero_grad
    if hasattr(own, "modules"):
        own.modules.add(module)
        return

    modules = WeakSet([module])

    @functools.wraps(own)
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        parameters = {id(p) for group in given.param_groups for p in group["params"]}
        for each in modules:
            drop_gradients(each, parameters)

    given.zero_grad = zero_grad
    given.zero_grad.modules = modules


def recover_from_failures(outermost: FSDPModule) -> None:
    """From now on, a forward pass of this unit starts afresh when the last backward pass has raised."""
    assert isinstance(outermost, nn.Module)
    eager: Any = torch.compiler.disable  # untyped in torch
    outermost.register_forward_pre_hook(eager(_recover), prepend=True)


def _recover(unit: nn.Module, args: Any) -> None:
    assert isinstance(unit, FSDPModule)
    context: Any = unit._get_fsdp_state()._state_ctx
    is_within = torch._C._current_graph_task_id() != -1  # checkpointed activations, computed again
    if is_within or not context.post_backward_final_callback_queued:
        return
    reset_passes(unit)
    assert isinstance(unit, nn.Module)
    drop_gradients(unit)
    reshard(unit)
