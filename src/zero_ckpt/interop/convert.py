"""Writes a checkpoint of any format as one of ours: read in slabs, then committed and checksummed like any save."""

from __future__ import annotations

import os

from zero_ckpt.core.checkpoint import Checkpoint, open_checkpoint
from zero_ckpt.core.control import LocalControl
from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.places import absolute, resolved
from zero_ckpt.core.state import Snapshot
from zero_ckpt.errors import ConfigurationError

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    tag: str | int | None = None,
    *,
    name: str | None = None,
    weights_only: bool = True,
) -> str:
    """Write `source` as a tag of the checkpoint directory `directory`; returns the tag's folder.

    `source`, `tag`: a checkpoint directory and a tag in it (None: its latest), or a tag's folder. `name`: of the new
    tag; None: that of the source. Model, optimizer state and objects are taken over bitwise, in one process; extra
    memory is a few slabs of 4 MiB, whatever the size. `weights_only=False` allows pickled objects, whose opening can
    run code.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `StateMismatchError` where optimizer state is in a form
    that is not known, `UnsafeObjectError`, `ConfigurationError` for a place that holds the source, or `SaveError`.
    """
    with open_checkpoint(source, None if tag is None else str(tag)) as checkpoint:
        target = name or os.path.basename(checkpoint.tag)
        folder = f"{absolute(directory)}/{target}"
        if resolved(folder) == resolved(checkpoint.path):
            raise ConfigurationError(
                f"{folder}: the new checkpoint would lie in the old one's folder; give another directory"
            )
        handle = SyncEngine(control=LocalControl()).save(
            directory,
            target,
            lambda: _snapshot(checkpoint, weights_only),
            step=checkpoint.manifest.step,
            zero_stage=checkpoint.manifest.zero_stage,
        )
        return handle.path


def _snapshot(checkpoint: Checkpoint, weights_only: bool) -> Snapshot:
    manifest = checkpoint.manifest
    return Snapshot(
        model={key: checkpoint.lazy("model", key) for key in checkpoint.keys("model")},
        optim={key: checkpoint.lazy("optim", key) for key in checkpoint.keys("optim")},
        objects=checkpoint.objects(weights_only),
        rank_objects=checkpoint.rank_objects(0, weights_only),
        buffers=frozenset(manifest.buffers),
        frozen=frozenset(manifest.frozen),
        aliases=dict(manifest.aliases),
        excluded=frozenset(manifest.excluded),
    )
