"""What FSDP2 keeps of the units that it shards, the same for every version of torch.

The only place that looks for it inside FSDP2; it changes nothing there but `reset_passes`, and `settle`, which a first
forward pass would do as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

__all__ = ["mesh_of_units", "outermost_units", "reset_passes", "settle", "sharded_records"]


def outermost_units(module: nn.Module) -> Iterator[FSDPModule]:
    """The units under `module` that lie in no other; `module` itself if it is one."""
    if isinstance(module, FSDPModule):
        yield module
        return
    for child in module.children():
        yield from outermost_units(child)


def settle(outermost: FSDPModule) -> None:
    """Let a unit know the units in it.

    Otherwise the first of them to be called takes itself for the outermost, and those around it fail later.
    """
    outermost._get_fsdp_state()._lazy_init()


def sharded_records(module: nn.Module) -> Iterator[Any]:
    """FSDP2's record of every parameter under `module` that it shards."""
    for group in _groups_under(module):
        yield from group.fsdp_params


def mesh_of_units(module: nn.Module) -> DeviceMesh | None:
    """The mesh that the first unit under `module` is sharded over; None without one."""
    group = next(_groups_under(module), None)
    return None if group is None else group.mesh_info.mesh


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
        for group in _groups(state):
            group._training_state = type(group._training_state).IDLE
            group.finalize_backward()
    context.iter_forward_root = None
    context.post_backward_final_callback_queued = False


def _groups_under(module: nn.Module) -> Iterator[Any]:
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            yield from _groups(submodule._get_fsdp_state())


def _groups(state: Any) -> list[Any]:
    """What a unit keeps of its parameters: several groups in newer torch."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(groups)
