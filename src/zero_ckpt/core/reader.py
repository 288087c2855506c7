"""Resharding reads: stored chunks into live local tensors, whatever the world size was. Every byte is verified.

A `Request` names a stored tensor and the box of it that a live local tensor wants. The wanted boxes are intersected
with the stored ones, the blocks that they touch are read once each, verified, and copied to where they belong, by a few
threads (`pipeline`). Extra memory is a few blocks, whatever the state's size.

Nothing unverified reaches a target. `verify` reads the same blocks and copies nothing, so that a caller that overwrites
live tensors can know beforehand that all is well. Blocks that go through no page cache are kept in memory in between,
as far as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.memory import WINDOW, aligned_buffer
from zero_ckpt.core.pipeline import run_pipeline
from zero_ckpt.core.placing import Part, Request, byte_span, copy_parts, home
from zero_ckpt.core.planner import Placed, needed_chunks
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.shards import ShardSet, StoredFile
from zero_ckpt.errors import CorruptShardError

__all__ = ["ReadPlan", "Request", "Sharing", "plan_reads"]

_FEW = 8
"""Parts of one block. Of a block with more of them it costs more to go through all for each window than windows save.

The interpreter is then the bottleneck, and more threads would only contend for it.
"""


@dataclass(slots=True)
class _FilePlan:
    """The parts that one file gives, by block index; a part that spans blocks stands under each."""

    role: str
    reader: StoredFile
    blocks: dict[int, list[Part]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sharing:
    """The roles of which all `world_size` ranks read the same blocks, and which rank this is."""

    rank: int
    world_size: int
    roles: frozenset[str]


_Held = dict[tuple[str, int], memoryview]
"""Verified blocks by file and index."""


@dataclass(frozen=True, slots=True)
class _Work:
    """One block to read. `keep`: it will be read again, by this rank or another on this host.

    In the methods, `fetched` is what `fetch` returned.
    """

    reader: StoredFile
    index: int
    parts: Sequence[Part]
    keep: bool

    def fetch(self, buffer: memoryview) -> memoryview | None:
        return self.reader.fetch(self.index, buffer, self.keep)

    def copy(self, buffer: memoryview, fetched: memoryview | None) -> None:
        """Fill the targets with a block that is verified before its first byte is copied."""
        if fetched is None:
            fetched = self.reader.read_block(self.index, buffer, self.keep)
        else:
            self.look(buffer, fetched)
        copy_parts(fetched, self.index * BLOCK, self.parts)

    def copy_windows(self, buffer: memoryview, fetched: memoryview | None) -> None:
        """Fill the targets piece by piece, or let the pieces be read into them; the block is verified at its end."""
        if len(self.parts) > _FEW:
            self.copy(buffer, fetched)
            return
        target: memoryview | None = None

        def memory(start: int, nbytes: int) -> memoryview:
            nonlocal target
            target = home(self.parts, start, nbytes)
            return buffer if target is None else target

        for start, data in self.reader.windows(self.index, memory, fetched, self.keep):
            if target is None:
                copy_parts(data, start, self.parts)

    def look(self, buffer: memoryview, fetched: memoryview | None) -> None:
        """Verify the block, and copy nothing."""
        for _ in self.reader.windows(self.index, lambda *_: buffer, fetched, self.keep):
            pass


@dataclass(frozen=True, slots=True)
class _Holding(_Work):
    """A block that is verified in `memory` and stays `held` there, since reading it again would be another download."""

    memory: memoryview
    held: _Held

    def fetch(self, buffer: memoryview) -> memoryview | None:
        return self.reader.fetch(self.index, self.memory, self.keep)

    def look(self, buffer: memoryview, fetched: memoryview | None) -> None:
        _Work.look(self, buffer, fetched)
        if fetched is not None and len(fetched) > WINDOW:  # a smaller one may come from near
            self.held[self.reader.name, self.index] = fetched


@dataclass(frozen=True, slots=True)
class _InMemory(_Work):
    """A block that was held, and so is verified already."""

    memory: memoryview

    def fetch(self, buffer: memoryview) -> memoryview | None:
        return self.memory

    def copy(self, buffer: memoryview, fetched: memoryview | None) -> None:
        copy_parts(self.memory, self.index * BLOCK, self.parts)

    copy_windows = copy


Action = Callable[[_Work, memoryview, "memoryview | None"], None]


def _copy(work: _Work, buffer: memoryview, fetched: memoryview | None) -> None:
    work.copy(buffer, fetched)


def _copy_windows(work: _Work, buffer: memoryview, fetched: memoryview | None) -> None:
    work.copy_windows(buffer, fetched)


def _look(work: _Work, buffer: memoryview, fetched: memoryview | None) -> None:
    work.look(buffer, fetched)


@dataclass(slots=True)
class ReadPlan:
    """The blocks to read for some requests, and what goes where from each; made once, run once or twice."""

    files: list[_FilePlan]
    _held: _Held = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """For each role what identifies the blocks to read: ranks with equal digests read the same ones."""
        hashers: dict[str, Any] = {}
        for plan in sorted(self.files, key=lambda plan: plan.reader.name):
            hasher = hashers.setdefault(plan.role, xxhash.xxh3_128())
            told = f"{plan.reader.name}\n{sorted(plan.blocks)}\n"
            hasher.update(told.encode(errors="surrogateescape"))  # not every path is UTF-8
        return {role: hasher.hexdigest() for role, hasher in hashers.items()}

    def verify(
        self, progress: Callable[[], None], sharing: Sharing | None = None, room: int = 0
    ) -> None:
        """Read and verify every block, and change nothing. Of blocks that all ranks read, verify this rank's share.

        `fill` finds the blocks in the page cache afterwards, as far as that has room. What goes through no page cache
        (an object store) is kept in memory for `fill`, up to `room` bytes.
        """
        work = self._work(sharing, again=True, divided=True)
        self._run(_look, progress, self._holding(work, room // BLOCK))

    def _holding(self, work: Sequence[_Work], count: int) -> Sequence[_Work]:
        """The same work, but that up to `count` blocks are kept in memory."""
        try:
            memory = aligned_buffer(min(count, len(work)) * BLOCK)  # taken as blocks come
        except MemoryError:
            return work
        rooms = (memory[at : at + BLOCK] for at in range(0, count * BLOCK, BLOCK))
        kept = [
            _Holding(item.reader, item.index, item.parts, item.keep, room, self._held)
            for item, room in zip(work[:count], rooms, strict=False)
        ]
        return [*kept, *work[len(kept) :]]

    def fill(
        self,
        progress: Callable[[], None],
        sharing: Sharing | None = None,
        *,
        verified: bool = False,
        private: bool = False,
    ) -> None:
        """Fill every target. Raises `CorruptShardError` or OSError; targets may then be partly filled.

        `verified`: `verify` has passed, on this rank or another. `private`: nobody uses the targets when this raises.
        With neither, no byte reaches a target before its block is verified.
        """
        action = _copy_windows if verified or private else _copy
        try:
            self._run(action, progress, self._work(sharing, again=verified))
        finally:
            self._held.clear()

    def _run(self, action: Action, progress: Callable[[], None], work: Sequence[_Work]) -> None:
        many = sum(len(item.parts) for item in work) > _FEW * len(work)
        run_pipeline(work, action, progress, one_of_each=many)

    def _work(
        self, sharing: Sharing | None, *, again: bool = False, divided: bool = False
    ) -> list[_Work]:
        """The blocks to read. What is read more than once goes through the page cache: from the disk once per host.

        `again`: they are read once more after or before this. `divided`: of shared blocks, this rank's share only.
        """
        work: list[_Work] = []
        for plan in self.files:
            shared = sharing is not None and plan.role in sharing.roles
            blocks = sorted(plan.blocks.items())
            if shared and divided:
                assert sharing is not None
                blocks = blocks[sharing.rank :: sharing.world_size]
            for index, parts in blocks:
                held = self._held.get((plan.reader.name, index))
                if held is None:
                    work.append(_Work(plan.reader, index, parts, again or shared))
                else:
                    work.append(_InMemory(plan.reader, index, parts, True, held))
        return work

    def fill_from(self, read_block: Callable[[StoredFile, int], memoryview]) -> None:
        """Fill every target on this thread, with verified blocks that `read_block(file, index)` gives."""
        with torch.no_grad():
            for plan in self.files:
                for index, parts in sorted(plan.blocks.items()):
                    copy_parts(read_block(plan.reader, index), index * BLOCK, parts)


def plan_reads(shards: ShardSet, requests: Iterable[Request]) -> ReadPlan:
    """Open what is needed, and find every chunk and block. Raises `CorruptShardError`; reads no data."""
    plans: dict[tuple[str, int], _FilePlan] = {}
    overlaps: dict[tuple[int, Box], list[tuple[int, Box, Box]]] = {}
    for request in requests:
        known = (id(request.placed), request.box)
        found = overlaps.get(known)
        if found is None:
            found = overlaps[known] = list(_overlaps(request.placed, request.box))
        for rank, box, overlap in found:
            plan = plans.get((request.role, rank))
            if plan is None:
                plan = plans[request.role, rank] = _FilePlan(
                    request.role, shards.get(request.role, rank)
                )
            _add_part(plan, request, box, overlap)
    return ReadPlan(list(plans.values()))


def _overlaps(placed: Placed, wanted: Box) -> Iterable[tuple[int, Box, Box]]:
    for rank, box in needed_chunks(placed, wanted):
        overlap = box.intersect(wanted)
        if overlap is not None:
            yield rank, box, overlap


def _add_part(plan: _FilePlan, request: Request, box: Box, overlap: Box) -> None:
    chunk = plan.reader.find(request.key, box)
    if (chunk.dtype, chunk.shape) != (request.placed.dtype, request.placed.shape):
        raise CorruptShardError(
            f"{plan.reader.name}: tensor '{request.key}': {request.placed.dtype} {list(request.placed.shape)} "
            f"expected by the manifest, {chunk.dtype} {list(chunk.shape)} found"
        )
    part = Part(request, chunk, overlap)
    first, last = byte_span(chunk, overlap)
    for index in range(first // BLOCK, (last - 1) // BLOCK + 1):
        plan.blocks.setdefault(index, []).append(part)
