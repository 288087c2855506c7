"""Reads what hooks keep of a loaded checkpoint, before the checkpoint may be removed or overwritten.

`on_load_checkpoint` gets lazy tensors. Most are gone when all is restored; those that somebody still holds are read
then, and are ordinary tensors for whoever uses them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from weakref import ref

import torch
from torch.utils._pytree import tree_leaves

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.lazy import LazyTensor

__all__ = ["HandedOut"]


class HandedOut:
    """The lazy tensors in a `content` that is about to be given to hooks. Keeps none of them alive."""

    def __init__(self, content: object) -> None:
        found = {id(each): each for each in tree_leaves(content) if isinstance(each, LazyTensor)}
        self._tensors = [ref(each) for each in found.values()]

    def read_kept(
        self, checkpoint: Checkpoint, progress: Callable[[], None] = lambda: None
    ) -> None:
        """Read those lazy tensors of `checkpoint` that somebody still holds. No communication.

        `progress` is called after each block. Raises `CorruptShardError` for damaged bytes.
        """
        if self._kept(checkpoint):
            gc.collect()  # perhaps it was only a cycle that held them
        kept = self._kept(checkpoint)
        values = [torch.empty(tuple(x.shape), dtype=x.dtype, device="cpu") for x in kept]
        requests = [
            checkpoint.request(each.role, each.key, value)
            for each, value in zip(kept, values, strict=True)
        ]
        checkpoint.read(requests, progress)
        for each, value in zip(kept, values, strict=True):
            each.become(value)

    def _kept(self, checkpoint: Checkpoint) -> list[LazyTensor]:
        alive = [tensor for each in self._tensors if (tensor := each()) is not None]
        return [each for each in alive if each.source is checkpoint and not each.is_read]
