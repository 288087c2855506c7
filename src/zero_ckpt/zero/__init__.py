"""How a model becomes ZeRO-sharded, on torch's own engines. Pure torch; knows no framework and no file.

    stage 0   DistributedDataParallel, wrapped by the caller
    stage 1   the same, and `partition_optimizer(optimizer)` for every optimizer (and `rebind_scheduler`)
    stage 2   `shard_module(module, stage=2, mesh=mesh)`    parameters whole from forward to backward
    stage 3   `shard_module(module, stage=3, mesh=mesh)`    parameters whole only while their unit runs

Experts that live on different ranks are declared first, with `declare_experts`.

Every function that communicates is collective over the mesh (or process group) that it names, and assumes that ranks
run the same modules and backward passes in the same order. Parameters that no rank uses are fine at every stage;
parameters that only some ranks use are not.
"""

from __future__ import annotations

from zero_ckpt.zero.clip import clip_grad_norm_, clip_grad_value_
from zero_ckpt.zero.experts import declare_experts
from zero_ckpt.zero.gathered import reshard
from zero_ckpt.zero.initial import broadcast_from_first, materialize
from zero_ckpt.zero.mesh import make_mesh
from zero_ckpt.zero.partition import (
    check_optimizer,
    owned_parameters,
    owned_state,
    partition_optimizer,
)
from zero_ckpt.zero.precision import ShardedGradScaler, mixed_precision_policy
from zero_ckpt.zero.rebind import rebind_optimizer, rebind_scheduler
from zero_ckpt.zero.shard import Sharding, shard_module
from zero_ckpt.zero.sync import gradient_sync_disabled, set_gradient_sync
from zero_ckpt.zero.wrap import WrapPolicy, resolve_units

__all__ = [
    "ShardedGradScaler",
    "Sharding",
    "WrapPolicy",
    "broadcast_from_first",
    "check_optimizer",
    "clip_grad_norm_",
    "clip_grad_value_",
    "declare_experts",
    "gradient_sync_disabled",
    "make_mesh",
    "materialize",
    "mixed_precision_policy",
    "owned_parameters",
    "owned_state",
    "partition_optimizer",
    "rebind_optimizer",
    "rebind_scheduler",
    "reshard",
    "resolve_units",
    "set_gradient_sync",
    "shard_module",
]
