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

__all__ = ["CLIENT_STATE", "client_state_notice", "own_client_state", "read_own"]

CLIENT_STATE = "client_state"
"""The rank object that holds what the user gave this rank to save."""


def read_own(checkpoint: Checkpoint, control: ControlPlane, weights_only: bool) -> dict[str, Any]:
    """What this rank stored for itself, at the same world size; else what rank 0 did."""
    same = checkpoint.manifest.world_size == control.world_size
    return checkpoint.rank_objects(control.rank if same else 0, weights_only)


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
