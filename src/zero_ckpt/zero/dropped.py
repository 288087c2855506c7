"""Gradients of a sharded model that are given up: those of passes that raised, or that `zero_grad` is to clear.

Passes that reduce nothing leave whole gradients inside of FSDP2, where `zero_grad` of an optimizer does not see them.

FSDP2 also ends each backward pass in a callback, which it queues once per pass. When the pass raises (out of memory, a
user's error) the callback is gone, and FSDP2 still believes it to be queued: no later pass would be ended, and
parameters whose gradients are reduced there, such as embeddings, would silently stay as they are.
DistributedDataParallel refuses to go on after such an error; here only the gradients of the failed pass are lost.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from zero_ckpt.zero.gathered import reshard

__all__ = [
    "drop_gradients",
    "drop_with_zero_grad",
    "parameter_groups",
    "recover_from_failures",
    "reset_passes",
    "sharded_records",
]


def sharded_records(module: nn.Module) -> Iterator[Any]:
    """FSDP2's record of every parameter under `module` that it shards."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            for group in parameter_groups(submodule._get_fsdp_state()):
                yield from group.fsdp_params


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


def recover_from_failures(outermost: nn.Module) -> None:
    """From now on, a forward pass of this unit starts afresh when the last backward pass has raised."""
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


def reset_passes(outermost: FSDPModule) -> None:
    """Let this unit begin its next forward pass afresh, whatever became of the last passes through it."""
    reset: Any = getattr(outermost, "reset_iter_state", None)  # older torch has none
    if reset is not None:
        reset()
        return
    context: Any = outermost._get_fsdp_state()._state_ctx
    for state in context.all_states:
        state._training_state = type(state._training_state).IDLE
        state._comm_ctx.post_forward_order.clear()
        for group in parameter_groups(state):
            group._training_state = type(group._training_state).IDLE
            group.finalize_backward()
    context.iter_forward_root = None
    context.post_backward_final_callback_queued = False


def parameter_groups(state: Any) -> list[Any]:
    """What FSDP2 keeps of a unit's parameters, of the unit's `_get_fsdp_state()`: several groups in newer torch."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(groups)
