"""What each rank stores for itself and finds again, on a load: its client state and its random number generators.

At the same world size every rank gets back its own. At another one no rank of the job is one of those that saved:
generators are derived from rank 0's, and nobody gets a client state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.control import ControlPlane
from zero_ckpt.core.rng import count_ranks
from zero_ckpt.core.shapes import Shape, misfit
from zero_ckpt.errors import FormatVersionError

__all__ = ["CLIENT_STATE", "client_state_notice", "own_client_state", "read_own", "read_rank"]

CLIENT_STATE = "client_state"
"""The rank object that holds what the user gave this rank to save."""


def read_own(
    checkpoint: Checkpoint,
    control: ControlPlane,
    weights_only: bool,
    parts: Mapping[str, Shape],
) -> dict[str, Any]:
    """What this rank stored for itself, at the same world size; else what rank 0 did. See `read_rank`."""
    same = checkpoint.manifest.world_size == control.world_size
    return read_rank(checkpoint, control.rank if same else 0, weights_only, parts)


def read_rank(
    checkpoint: Checkpoint, rank: int, weights_only: bool, parts: Mapping[str, Shape]
) -> dict[str, Any]:
    """What `rank` of the saving job stored for itself.

    `parts`: what the caller is going to use of it, as far as it is there. Raises `FormatVersionError` where one of
    these is not as this version stores it.
    """
    own = checkpoint.rank_objects(rank, weights_only)
    for name, shape in parts.items():
        if name in own and (problem := misfit(own[name], shape, name)):
            raise FormatVersionError(
                f"{checkpoint.path}: what rank {rank} stored for itself is not as this version of zero_ckpt stores it: "
                f"{problem}. Nothing was loaded. Load it with the version that saved it; or its weights alone, by "
                "load_module_only=True; or weights, optimizers and schedulers, by zero_ckpt.Checkpointer(model, "
                "optimizer, scheduler, rng=False)."
            )
    return own


def own_client_state(checkpoint: Checkpoint, control: ControlPlane, own: Mapping[str, Any]) -> Any:
    """The client state in `own`, which `read_own` gave; None at another world size."""
    same = checkpoint.manifest.world_size == control.world_size
    return own.get(CLIENT_STATE) if same else None


def client_state_notice(checkpoint: Checkpoint, world_size: int, own: Mapping[str, Any]) -> str:
    """What the user should know of a per-rank client state that nobody gets; "" where there is none."""
    saved = checkpoint.manifest.world_size
    if saved == world_size or own.get(CLIENT_STATE) is None:
        return ""
    return (
        f"{checkpoint.path} was saved by {count_ranks(saved)} and is loaded by {world_size}: nobody gets a "
        "per_rank_client_state, since no rank here is one of those that saved"
    )
