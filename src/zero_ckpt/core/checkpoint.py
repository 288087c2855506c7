"""One committed checkpoint, opened for reading: its manifest, its objects, its tensors.

Opening verifies the manifest; a shard file's header is verified when it is first needed, a data block whenever it is
read. Nothing here communicates: each rank opens for itself, and `loading` makes ranks agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.dtensors import TORCH_DTYPES
from zero_ckpt.core.finding import fallback_notice, find_checkpoint
from zero_ckpt.core.foreign import problem_of
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.notices import warn_user
from zero_ckpt.core.objects import OBJECTS, RANK_OBJECTS, decode_objects
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.reader import ReadPlan, Request, plan_reads
from zero_ckpt.core.runs import Run
from zero_ckpt.core.shard_file import REMEDY
from zero_ckpt.core.shards import open_shards
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import read_tag
from zero_ckpt.errors import CorruptShardError, StateMismatchError

__all__ = ["Checkpoint", "open_checkpoint"]


class Checkpoint:
    """Reads one checkpoint. Close it, or use it in a `with` statement; lazy tensors reopen what they need."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest | None = None) -> None:
        self.storage = storage
        self.path = folder
        self.manifest = manifest or read_tag(storage, folder)
        self.shards = open_shards(storage, folder, self.manifest)

    @property
    def tag(self) -> str:
        return self.manifest.tag

    def keys(self, role: str) -> list[str]:
        """Stored tensors of `role` (`model`, `optim` or `state`), in the order of the save.

        Raises `StateMismatchError` when another system's checkpoint has them in a form that is not known.
        """
        problem = problem_of(self.manifest, role)
        if problem:
            raise StateMismatchError(f"{self.path}: {problem}")
        return list(self.manifest.tensors[role])

    def resolve(self, key: str) -> str | None:
        """The stored model tensor that `key` names, directly or as a tied name; None when there is none."""
        if key in self.manifest.tensors["model"]:
            return key
        return self.manifest.aliases.get(key)

    def placed(self, role: str, key: str) -> Placed:
        """Raises `StateMismatchError` for a tensor that is not in the checkpoint."""
        try:
            return self.manifest.tensors[role][key]
        except KeyError:
            raise StateMismatchError(f"{self.path}: no {role} tensor '{key}'") from None

    def request(self, role: str, key: str, target: torch.Tensor, box: Box | None = None) -> Request:
        """A read of `box` (None: the whole tensor) of a stored tensor into the local tensor `target`."""
        placed = self.placed(role, key)
        return Request(role, key, placed, box or full_box(placed.shape), target)

    def read(
        self, requests: Sequence[Request], progress: Callable[[], None] = lambda: None
    ) -> None:
        """Fill every target with verified bytes."""
        plan_reads(self.shards, requests).fill(progress)

    def plan_reads(self, requests: Sequence[Request]) -> ReadPlan:
        """The reads that `requests` need, to be verified and filled in two steps."""
        return plan_reads(self.shards, requests)

    def tensor(self, role: str, key: str, box: Box | None = None) -> torch.Tensor:
        """A stored tensor, or a box of it, as a new plain tensor on the CPU."""
        placed = self.placed(role, key)
        wanted = box or full_box(placed.shape)
        target = torch.empty(wanted.shape, dtype=TORCH_DTYPES[placed.dtype], device="cpu")
        self.read([Request(role, key, placed, wanted, target)])
        return target

    def lazy(self, role: str, key: str) -> LazyTensor:
        """A stand-in that reads on first use."""
        placed = self.placed(role, key)
        dtype = TORCH_DTYPES[placed.dtype]
        tensor = LazyTensor(role, key, placed.shape, dtype, lambda box: self.tensor(role, key, box))
        tensor.source = self
        tensor.fill = lambda box, target: self.read([self.request(role, key, target, box)])
        return tensor

    def objects(self, weights_only: bool = True) -> dict[str, Any]:
        """The tree that rank 0 stored. Tensors that ranks held in parts are lazy. See `objects.decode_objects`."""
        return self._tree(OBJECTS, 0, weights_only)

    def rank_objects(self, rank: int, weights_only: bool = True) -> dict[str, Any]:
        """The tree that `rank` stored for itself."""
        return self._tree(RANK_OBJECTS, rank, weights_only)

    def _tree(self, name: str, rank: int, weights_only: bool) -> dict[str, Any]:
        reader = self.shards.get("state", rank)
        private = {chunk.key: chunk for chunk in reader.chunks}
        requests: list[Request] = []

        def entry(key: str) -> torch.Tensor:
            """Memory for one entry. All entries are read together once the tree is known: many lie in one block."""
            chunk = private.get(key)
            if chunk is None or chunk.box != full_box(chunk.shape):
                raise CorruptShardError(
                    f"{reader.name}: no whole entry '{key}', which its objects name. {REMEDY}"
                )
            placed = Placed(chunk.dtype, chunk.shape, (Run(rank, chunk.box.offset, chunk.shape),))
            target = torch.empty(chunk.shape, dtype=TORCH_DTYPES[chunk.dtype], device="cpu")
            requests.append(Request("state", key, placed, chunk.box, target))
            return target

        tree = decode_objects(
            reader.read_entry(f"{name}.json"),
            entry,
            dtensor=lambda key: self.lazy("state", key),
            blob=reader.read_entry,
            weights_only=weights_only,
            where=f"{reader.name}: {name}",
        )
        if not isinstance(tree, dict):
            raise CorruptShardError(
                f"{reader.name}: {name}: a dict expected, {type(tree).__name__} found. {REMEDY}"
            )
        self.read(requests)
        return tree

    def close(self) -> None:
        self.shards.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    path: str | os.PathLike[str], tag: str | None = None, *, storage: Storage | None = None
) -> Checkpoint:
    """Open a checkpoint directory's `tag`, or a tag folder given directly.

    Without a tag: what `latest` names; when that is missing or damaged, the newest one whose manifest and file lengths
    verify, with a warning. Raises `CheckpointNotFoundError`, `CorruptCheckpointError` or `FormatVersionError`.
    """
    storage = storage or AnyStorage()
    found = find_checkpoint(storage, absolute(path), tag)
    if found.problems:
        warn_user(fallback_notice(found.problems, found.folder))
    return Checkpoint(storage, found.folder, found.manifest)
