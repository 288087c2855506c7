"""One rank's part of a save: its table of tensors, its shard files' layouts, and writing them durably.

Knows the live tensors and the plan; knows nothing of other ranks' files, of votes, or of the manifest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import xxhash

from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.dtensors import layout_of, local_part
from zero_ckpt.core.experts import ExpertNotes
from zero_ckpt.core.layout import ROLES, Layout, Table
from zero_ckpt.core.manifest import FileRecord, shard_name
from zero_ckpt.core.naming import split_expert
from zero_ckpt.core.objects import OBJECTS, RANK_OBJECTS, encode_objects
from zero_ckpt.core.options import digests_of_options
from zero_ckpt.core.planner import SavePlan
from zero_ckpt.core.recovery import content_digest
from zero_ckpt.core.shard_file import ShardLayout, layout_shard
from zero_ckpt.core.sources import Slab, Source, source_of, view_of
from zero_ckpt.core.staging import ShardWrite
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.state_values import pickled_values
from zero_ckpt.core.storage import FileWriter, Storage
from zero_ckpt.errors import StateMismatchError

__all__ = [
    "Captured",
    "ShardPlan",
    "capture",
    "plan_shards",
    "write_shards",
]


@dataclass(slots=True)
class Captured:
    """A snapshot in storable terms. `private`: entries of this rank's state file that no other rank knows of.

    `pickled`: path -> type of objects that are stored as pickles. `options`: see `digests_of_options`.
    """

    tensors: dict[str, dict[str, torch.Tensor]] = field(
        default_factory=lambda: {role: {} for role in ROLES}
    )
    table: Table = field(default_factory=Table)
    private: dict[str, torch.Tensor] = field(default_factory=dict)
    pickled: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    @property
    def private_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.private.values())

    def all_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that ranks store together, of every role."""
        return chain.from_iterable(keys.values() for keys in self.tensors.values())

    @property
    def pickle_notice(self) -> str:
        """A warning of values that a load will refuse, or "". Names no checkpoint, so that Python shows it once."""
        if not self.pickled:
            return ""
        shown = [f"'{path}' ({kind})" for path, kind in list(self.pickled.items())[:3]]
        more = ", ..." if len(self.pickled) > 3 else ""
        return (
            f"stored as pickles: {', '.join(shown)}{more}. Opening a pickle can run code, so a load refuses it unless "
            "it is told weights_only=False. Plain values, tensors and arrays load without."
        )


def capture(snapshot: Snapshot, rank: int) -> Captured:
    """Name every tensor, and describe how it lies on the ranks. Copies nothing but what Python values encode to."""
    captured = Captured(options=digests_of_options(snapshot.objects.get("optimizers", {})))
    objects = encode_objects(snapshot.objects, OBJECTS)
    own = encode_objects(snapshot.rank_objects, RANK_OBJECTS)
    if own.dtensors:
        raise StateMismatchError(
            f"rank_objects hold DTensors ({', '.join(list(own.dtensors)[:3])}): they belong into objects, "
            "which all ranks store together"
        )
    if rank == 0:
        captured.private = {f"{OBJECTS}.json": _bytes(objects.json), **objects.entries}
    captured.private |= {f"{RANK_OBJECTS}.json": _bytes(own.json), **own.entries}
    own_pickled = {f"{RANK_OBJECTS}/{path}": kind for path, kind in own.pickled.items()}
    captured.pickled = objects.pickled | own_pickled | pickled_values(snapshot.optim)
    captured.tensors = {"model": snapshot.model, "optim": snapshot.optim, "state": objects.dtensors}
    for role, keys in captured.tensors.items():
        whole = snapshot.buffers if role == "model" else frozenset()
        captured.table.roles[role] = {
            key: layout_of(key, tensor, key in whole) for key, tensor in keys.items()
        }
    if snapshot.experts:
        captured.table.experts = _notes(snapshot)
    return captured


def _notes(snapshot: Snapshot) -> ExpertNotes:
    """What goes into the table about the experts of this rank."""

    def of_experts(keys: Iterable[str]) -> list[str]:
        return sorted(key for key in keys if split_expert(key, snapshot.experts))

    records = snapshot.objects.get("optimizers", {})
    groups = {name: [g["params"] for g in record["groups"]] for name, record in records.items()}
    return ExpertNotes(
        shares=snapshot.experts,
        buffers=of_experts(snapshot.buffers),
        frozen=of_experts(snapshot.frozen),
        excluded=of_experts(snapshot.excluded),
        aliases={key: snapshot.aliases[key] for key in of_experts(snapshot.aliases)},
        groups=xxhash.xxh3_128_hexdigest(json.dumps(groups).encode()),
    )


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@dataclass(slots=True)
class ShardPlan:
    """One file that this rank writes."""

    name: str
    layout: ShardLayout
    sources: list[Source]


def plan_shards(
    captured: Captured,
    plan: SavePlan,
    rank: int,
    world_size: int,
    generation: int,
    metadata: Mapping[str, str],
    header: Mapping[str, Any],
) -> list[ShardPlan]:
    """The files that `rank` writes, one for each role that it has anything of.

    `metadata` goes into each. `header`, the manifest's fields that no shard shows, goes into rank 0's state file, so
    that a lost manifest can be rebuilt from the shard files alone.
    """
    shards = []
    for role in ROLES:
        live = captured.tensors[role]
        layouts = captured.table.roles[role]
        items: list[tuple[str, Layout, Box, torch.Tensor]] = []
        for key, box in plan.chunks_of(rank, role):
            layout = layouts[key]
            local, held = local_part(key, live[key], layout, rank)
            if held is None:
                raise AssertionError(f"the plan gives '{key}' to rank {rank}, which has none of it")
            items.append((key, layout, box, view_of(local, held, box)))
        if role == "state":
            items += [_private_item(key, tensor) for key, tensor in captured.private.items()]
        if items:
            meta = {"role": role, "rank": str(rank), "world_size": str(world_size), **metadata}
            if role == "state" and rank == 0:
                told = {**header, "content": content_digest(header, plan.roles)}
                meta["manifest"] = json.dumps(told, sort_keys=True)
            name = shard_name(role, rank, world_size, generation)
            shards.append(_shard(name, items, meta))
    return shards


def _private_item(key: str, tensor: torch.Tensor) -> tuple[str, Layout, Box, torch.Tensor]:
    layout = layout_of(key, tensor)
    return key, layout, full_box(layout.shape), tensor


def _shard(
    name: str, items: list[tuple[str, Layout, Box, torch.Tensor]], metadata: Mapping[str, str]
) -> ShardPlan:
    layout = layout_shard(((k, lay.dtype, lay.shape, box) for k, lay, box, _ in items), metadata)
    tensors = {(key, box.offset): tensor for key, _, box, tensor in items}
    slab = Slab()
    sources = [source_of(tensors[c.key, c.box.offset], slab) for c in layout.chunks]
    return ShardPlan(name, layout, sources)


def write_shards(
    storage: Storage,
    folder: str,
    shards: list[ShardPlan],
    pool: StagingPool,
    progress: Callable[[], None],
    staged: Callable[[], None] = lambda: None,
) -> tuple[dict[str, FileRecord], dict[str, float]]:
    """Write every file durably. Returns name -> record, and phase -> seconds.

    `staged` is called when all live tensors have been copied; writing may go on long after it. On an error, also one
    that it raises, all files of this call are removed.
    """
    files: list[_File] = []
    try:
        begin = time.perf_counter()
        for shard in shards:
            files.append(_File(storage, f"{folder}/{shard.name}", shard))
            files[-1].stage(pool, progress)
        staged()
        copied = time.perf_counter()
        for file in files:
            file.join()
        written = time.perf_counter()
        records = {file.shard.name: file.finish() for file in files}
        storage.sync(folder)
        synced = time.perf_counter()
    except BaseException:
        for file in files:
            file.abort()
        raise
    return records, {
        "stage": copied - begin,
        "write": written - copied,
        "fsync": synced - written,
    }


class _File:
    """One file of `write_shards`, from its creation to its end."""

    def __init__(self, storage: Storage, path: str, shard: ShardPlan) -> None:
        self.shard = shard
        self._storage, self._path = storage, path
        self._writer: FileWriter | None = None
        self._write: ShardWrite | None = None
        self._table = b""

    def stage(self, pool: StagingPool, progress: Callable[[], None]) -> None:
        layout = self.shard.layout
        self._writer = self._storage.create(self._path, layout.nbytes)
        self._write = ShardWrite(self._writer, layout, self.shard.sources, pool, progress)

    def join(self) -> None:
        write, self._write = self._write, None
        if write is not None:
            self._table = write.join()

    def finish(self) -> FileRecord:
        assert self._writer is not None
        writer, self._writer = self._writer, None
        try:
            writer.finish(self.shard.layout.nbytes)
        except BaseException:
            writer.abort()
            raise
        return self.shard.layout.record(self._table)

    def abort(self) -> None:
        """Stop writing, and remove what was written. Never raises."""
        with suppress(BaseException):
            self.join()
        if self._writer is not None:
            self._writer.abort()
        with suppress(OSError):
            self._storage.remove(self._path)
