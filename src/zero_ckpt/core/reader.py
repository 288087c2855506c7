"""Resharding reads: stored chunks into live local tensors, whatever the world size was. Every byte is verified.

A `Request` names a stored tensor and the box of it that a live local tensor wants. The wanted boxes are intersected
with the stored ones, the blocks that they touch are read once each, verified, and copied to where they belong, by a few
threads. Extra memory is `READ_THREADS` blocks, whatever the state's size.

Nothing unverified reaches a target. `verify` reads the same blocks and copies nothing, so that a caller that overwrites
live tensors can know beforehand that all is well.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from zero_ckpt.core.chunks import Box, flat_range_boxes
from zero_ckpt.core.dtensors import DTYPE_NAMES, TORCH_DTYPES
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.memory import copy_bytes
from zero_ckpt.core.planner import Placed, needed_chunks
from zero_ckpt.core.shard_file import BLOCK, Chunk
from zero_ckpt.core.shards import ShardSet, StoredFile
from zero_ckpt.core.storage import aligned_buffer
from zero_ckpt.errors import CorruptShardError

__all__ = ["ReadPlan", "Request", "Sharing", "plan_reads"]

READ_THREADS = 4
"""Blocks in flight of one rank."""

_FEW = 8
"""Parts of a block. With more of them, going through all for each window costs more than windows save."""


@dataclass(frozen=True, slots=True)
class Request:
    """Fill `target`, a local tensor of `box.shape`, with `box` of the stored tensor `key`.

    Another dtype than the stored one is converted. `target` may have any strides and lie on any device.
    """

    role: str
    key: str
    placed: Placed
    box: Box
    target: torch.Tensor


@dataclass(slots=True)
class _Part:
    """What one request takes from one stored chunk."""

    request: Request
    chunk: Chunk
    overlap: Box


@dataclass(slots=True)
class _FilePlan:
    """The parts that one file gives, by block index; a part that spans blocks stands under each."""

    role: str
    reader: StoredFile
    blocks: dict[int, list[_Part]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sharing:
    """The roles of which all `world_size` ranks read the same blocks, and which rank this is."""

    rank: int
    world_size: int
    roles: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Work:
    """One block to read. `keep`: it will be read again, by this rank or another."""

    reader: StoredFile
    index: int
    parts: Sequence[_Part]
    keep: bool

    def copy(self, buffer: memoryview) -> None:
        """Fill the targets with a block that is verified before its first byte is copied."""
        data = self.reader.read_block(self.index, buffer, self.keep)
        _copy_block(data, self.index * BLOCK, self.parts)

    def copy_again(self, buffer: memoryview) -> None:
        """Fill the targets with a block that `look` has verified; it is verified once more on the way."""
        if len(self.parts) > _FEW:
            self.copy(buffer)
            return
        for start, data in self.reader.read_windows(self.index, buffer, self.keep):
            _copy_block(data, start, self.parts)

    def look(self, buffer: memoryview) -> None:
        """Verify the block, and copy nothing."""
        for _ in self.reader.read_windows(self.index, buffer, self.keep):
            pass


@dataclass(slots=True)
class ReadPlan:
    """The blocks to read for some requests, and what goes where from each; made once, run once or twice."""

    files: list[_FilePlan]

    def digests(self) -> dict[str, str]:
        """For each role what identifies the blocks to read: ranks with equal digests read the same ones."""
        hashers: dict[str, Any] = {}
        for plan in sorted(self.files, key=lambda plan: plan.reader.name):
            hasher = hashers.setdefault(plan.role, xxhash.xxh3_128())
            hasher.update(f"{plan.reader.name}\n{sorted(plan.blocks)}\n".encode())
        return {role: hasher.hexdigest() for role, hasher in hashers.items()}

    def verify(self, progress: Callable[[], None], sharing: Sharing | None = None) -> None:
        """Read and verify every block, and change nothing; of what all ranks read, this rank's share.

        It leaves the blocks in the page cache, where `fill` finds them, as far as they have room there.
        """
        _run(self._work(sharing, again=True, divided=True), _Work.look, progress)

    def fill(
        self,
        progress: Callable[[], None],
        sharing: Sharing | None = None,
        *,
        verified: bool = False,
    ) -> None:
        """Fill every target. Raises `CorruptShardError` or OSError; targets may then be partly filled.

        `verified`: by `verify`, on this rank or another. Else no byte reaches a target before its block is verified.
        """
        work = self._work(sharing, again=verified)
        _run(work, _Work.copy_again if verified else _Work.copy, progress)

    def _work(
        self, sharing: Sharing | None, *, again: bool = False, divided: bool = False
    ) -> list[_Work]:
        """What is read more than once is read through the page cache: the disk gives it once to each host."""
        work: list[_Work] = []
        for plan in self.files:
            shared = sharing is not None and plan.role in sharing.roles
            blocks = sorted(plan.blocks.items())
            if shared and divided:
                assert sharing is not None
                blocks = blocks[sharing.rank :: sharing.world_size]
            work += [_Work(plan.reader, index, parts, again or shared) for index, parts in blocks]
        return work

    def fill_from(self, read_block: Callable[[StoredFile, int], memoryview]) -> None:
        """Fill every target on this thread, with verified blocks that `read_block(file, index)` gives."""
        with torch.no_grad():
            for plan in self.files:
                for index, parts in sorted(plan.blocks.items()):
                    _copy_block(read_block(plan.reader, index), index * BLOCK, parts)


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
    part = _Part(request, chunk, overlap)
    first, last = _byte_span(chunk, overlap)
    for index in range(first // BLOCK, (last - 1) // BLOCK + 1):
        plan.blocks.setdefault(index, []).append(part)


def _byte_span(chunk: Chunk, overlap: Box) -> tuple[int, int]:
    """The bytes of the data section from the overlap's first to behind its last element."""
    if overlap.shape == chunk.box.shape:
        return chunk.begin, chunk.end
    first = last = 0
    relative = overlap.relative_to(chunk.box)
    for offset, extent, size in zip(relative.offset, relative.shape, chunk.box.shape, strict=True):
        first, last = first * size + offset, last * size + offset + extent - 1
    size = itemsize(chunk.dtype)
    return chunk.begin + first * size, chunk.begin + (last + 1) * size


def _run(
    blocks: Sequence[_Work],
    action: Callable[[_Work, memoryview], None],
    progress: Callable[[], None],
) -> None:
    """Do it with all blocks on a few threads; the first error stops the rest and is raised."""
    work = iter(blocks)
    lock, stop = threading.Lock(), threading.Event()

    def worker() -> None:
        with torch.no_grad(), _buffer() as buffer:
            while not stop.is_set():
                with lock:
                    item = next(work, None)
                if item is None:
                    return
                try:
                    action(item, buffer)
                except BaseException:
                    stop.set()
                    raise
                progress()

    count = min(READ_THREADS, len(blocks))
    if count <= 1:
        worker()
        return
    with ThreadPoolExecutor(count, thread_name_prefix="zero_ckpt-read") as pool:
        for future in [pool.submit(worker) for _ in range(count)]:
            future.result()


class _buffer:
    """A block-sized buffer, reused between reads: memory is slow the first time that it is touched."""

    _free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()

    def __enter__(self) -> memoryview:
        try:
            self._view = self._free.get_nowait()
        except queue.Empty:
            self._view = memoryview(aligned_buffer(BLOCK))
        return self._view

    def __exit__(self, *_: object) -> None:
        self._free.put(self._view)


def _copy_block(data: memoryview, start: int, parts: Sequence[_Part]) -> None:
    """Copy to every part's target what `data`, the bytes of the data section from `start` on, has for it."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    stop = start + len(data)
    for part in parts:
        first, last = _byte_span(part.chunk, part.overlap)
        begin, end = max(first, start), min(last, stop)
        if begin >= end:
            continue
        target = _direct_address(part)
        if target:
            copy_bytes(target + begin - first, address + begin - start, end - begin)
        else:
            _copy_strided(data[begin - start : end - start], begin, part)


def _direct_address(part: _Part) -> int:
    """Where the overlap's bytes go, when they lie in one piece both in the chunk and in the target; else 0."""
    request, overlap = part.request, part.overlap
    target = request.target
    if target.device.type != "cpu" or DTYPE_NAMES[target.dtype] != part.chunk.dtype:
        return 0
    if not target.is_contiguous() or target.is_conj() or target.is_neg():
        return 0
    wanted, stored = request.box, part.chunk.box
    if not (
        _in_one_piece(overlap.shape, stored.shape) and _in_one_piece(overlap.shape, wanted.shape)
    ):
        return 0
    address = target.data_ptr()  # 0 for a wrapper around other tensors
    if not address or overlap.shape == wanted.shape:
        return address
    at = 0
    for offset, size in zip(overlap.relative_to(wanted).offset, wanted.shape, strict=True):
        at = at * size + offset
    return address + at * itemsize(part.chunk.dtype)


def _in_one_piece(shape: Sequence[int], outer: Sequence[int]) -> bool:
    """Whether a box of `shape` in a row-major tensor of shape `outer` is one range of its memory."""
    if shape == outer:
        return True
    whole = True
    for extent, size in zip(reversed(shape), reversed(outer), strict=True):
        if extent != 1 and not whole:
            return False
        whole = whole and extent == size
    return True


def _copy_strided(data: memoryview, begin: int, part: _Part) -> None:
    """Through torch: other strides, dtype or device than the stored bytes have."""
    chunk, request = part.chunk, part.request
    size, dtype = itemsize(chunk.dtype), TORCH_DTYPES[chunk.dtype]
    first, last = (begin - chunk.begin) // size, (begin - chunk.begin + len(data)) // size
    flat = torch.frombuffer(data, dtype=torch.uint8)
    at = 0
    for box in flat_range_boxes(chunk.box.shape, first, last):
        nbytes = box.numel * size
        stored = box.shifted(chunk.box.offset)
        wanted = stored.intersect(part.overlap)
        if wanted is not None:
            source = (
                flat[at : at + nbytes]
                .view(dtype)
                .view(box.shape)[wanted.relative_to(stored).slices()]
            )
            request.target[wanted.relative_to(request.box).slices()].copy_(source)
        at += nbytes
