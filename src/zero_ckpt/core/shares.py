"""Verification of a whole checkpoint by all ranks together, before any of it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.control import ControlPlane
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.reader import Request, Sharing
from zero_ckpt.core.runs import Run

__all__ = ["verify_share"]


def verify_share(
    checkpoint: Checkpoint, roles: Sequence[str], control: ControlPlane, sharing: Sharing | None
) -> None:
    """Read and verify every block of this rank's share of the files: the ones that ranks of its number wrote.

    At the same world size that is what this rank loads next. `roles`: of the files to verify. `sharing`: the roles that
    all ranks will load whole, so that what is read stays in the page cache. Raises `CorruptShardError`.
    """
    manifest = checkpoint.manifest
    requests = []
    for rank in range(control.rank, manifest.world_size, control.world_size):
        for role in roles:
            if manifest.file_of(role, rank) in manifest.files:
                requests += _all_of(checkpoint, role, rank)
    checkpoint.plan_reads(requests).verify(control.beat, sharing)


def _all_of(checkpoint: Checkpoint, role: str, rank: int) -> list[Request]:
    nothing = torch.empty(0, device="cpu")  # verification fills no target
    return [
        Request(
            role,
            chunk.key,
            Placed(chunk.dtype, chunk.shape, (Run(rank, chunk.box.offset, chunk.box.shape),)),
            chunk.box,
            nothing,
        )
        for chunk in checkpoint.shards.get(role, rank).chunks
        if chunk.box.numel
    ]
