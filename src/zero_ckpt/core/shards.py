"""The files that hold one checkpoint's tensors, each opened when first needed, closed as one. Imports no torch.

Readers see each as a `StoredFile`: blocks of bytes, and where in them each chunk lies. A shard file of ours is verified
block by block; a file of another system (see `foreign`) as far as that system's format allows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.foreign import ForeignManifest
from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.shard_file import Chunk
from zero_ckpt.core.shard_reader import open_shard
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import CorruptManifestError

__all__ = ["ShardSet", "StoredFile", "open_shards"]


class StoredFile(Protocol):
    """An open file. `name`: what messages call it; no other open file has the same."""

    name: str

    @property
    def chunks(self) -> Sequence[Chunk]: ...

    def find(self, key: str, box: Box) -> Chunk:
        """The chunk of `key` that holds exactly `box`. Raises `CorruptShardError`."""

    def read_block(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview:
        """Block `index`, of `BLOCK` bytes but for the last, in `buffer`. Raises `CorruptShardError`."""

    def fetch(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview | None:
        """The block, read into `buffer` and not verified; None when it is cheaper to let `windows` read it."""

    def windows(
        self,
        index: int,
        memory: Callable[[int, int], memoryview],
        fetched: memoryview | None,
        keep: bool = False,
    ) -> Iterator[tuple[int, memoryview]]:
        """The block in pieces, as (first byte in the data section, bytes); verified when the last one has been taken.

        `fetched`: what `fetch` returned. If None, each piece is read into `memory(first byte, number of bytes)`.
        """

    def read_entry(self, key: str) -> bytes:
        """All bytes of a small chunk."""

    def close(self) -> None: ...


class ShardSet:
    """The shard files of one checkpoint of ours, each verified when it is opened."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage, self._folder, self.manifest = storage, folder, manifest
        self._open: dict[str, StoredFile] = {}
        self._lock = threading.Lock()

    def get(self, role: str, rank: int) -> StoredFile:
        name = self.manifest.file_of(role, rank)
        if name not in self.manifest.files:
            raise CorruptManifestError(
                f"{self._folder}: the manifest lists no '{name}', where rank {rank} keeps its {role}"
            )
        with self._lock:
            if name not in self._open:
                path = f"{self._folder}/{name}"
                self._open[name] = open_shard(self._storage, path, self.manifest.files[name])
            return self._open[name]

    def close(self) -> None:
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ForeignShards(ShardSet):
    """The files of another system's checkpoint."""

    def __init__(self, storage: Storage, folder: str, manifest: ForeignManifest) -> None:
        super().__init__(storage, folder, manifest)
        self._content = manifest.content

    def get(self, role: str, rank: int) -> StoredFile:
        found: StoredFile = self._content.file(role, rank)
        return found

    def close(self) -> None:
        self._content.close()


def open_shards(storage: Storage, folder: str, manifest: Manifest) -> ShardSet:
    """The files that hold the checkpoint in `folder`, by its `manifest`."""
    if isinstance(manifest, ForeignManifest):
        return _ForeignShards(storage, folder, manifest)
    return ShardSet(storage, folder, manifest)
