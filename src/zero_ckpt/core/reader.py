"""Resharding reads: stored chunks into live local tensors, whatever the world size was. Every byte is verified.

A `Request` names a stored tensor and the box of it that a live local tensor wants. The wanted boxes are intersected
with the stored ones, the blocks that they touch are read once each, verified, and copied to where they belong, by a few
threads. Extra memory is `_BUFFERS` blocks, whatever the state's size.

Nothing unverified reaches a target. `verify` reads the same blocks and copies nothing, so that a caller that overwrites
live tensors can know beforehand that all is well.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from zero_ckpt.core.chunks import Box, flat_range_boxes
from zero_ckpt.core.dtensors import DTYPE_NAMES, TORCH_DTYPES
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.memory import aligned_buffer, copy_bytes
from zero_ckpt.core.planner import Placed, needed_chunks
from zero_ckpt.core.shard_file import BLOCK, Chunk
from zero_ckpt.core.shards import ShardSet, StoredFile
from zero_ckpt.core.threads import start_thread
from zero_ckpt.errors import CorruptShardError

__all__ = ["ReadPlan", "Request", "Sharing", "plan_reads"]

_FETCHERS, _WORKERS, _BUFFERS = 4, 3, 6
"""Threads that read, threads that verify and copy, and the blocks that they hold between them."""

_FEW = 8
"""Parts of a block. With more of them, going through all for each window costs more than windows save.

And then the interpreter is the bottleneck, for which more threads would only contend.
"""


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
    """One block to read. `keep`: it will be read again, by this rank or another.

    `fetched` is what `fetch` returned.
    """

    reader: StoredFile
    index: int
    parts: Sequence[_Part]
    keep: bool

    def fetch(self, buffer: memoryview) -> memoryview | None:
        return self.reader.fetch(self.index, buffer, self.keep)

    def copy(self, buffer: memoryview, fetched: memoryview | None) -> None:
        """Fill the targets with a block that is verified before its first byte is copied."""
        if fetched is None:
            fetched = self.reader.read_block(self.index, buffer, self.keep)
        else:
            self.look(buffer, fetched)
        _copy_block(fetched, self.index * BLOCK, self.parts)

    def copy_windows(self, buffer: memoryview, fetched: memoryview | None) -> None:
        """Fill the targets piece by piece, or let the pieces be read into them; the block is verified at its end."""
        if len(self.parts) > _FEW:
            self.copy(buffer, fetched)
            return
        home: memoryview | None = None

        def memory(start: int, nbytes: int) -> memoryview:
            nonlocal home
            home = _home(self.parts, start, nbytes)
            return buffer if home is None else home

        for start, data in self.reader.windows(self.index, memory, fetched, self.keep):
            if home is None:
                _copy_block(data, start, self.parts)

    def look(self, buffer: memoryview, fetched: memoryview | None) -> None:
        """Verify the block, and copy nothing."""
        for _ in self.reader.windows(self.index, lambda *_: buffer, fetched, self.keep):
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
        private: bool = False,
    ) -> None:
        """Fill every target. Raises `CorruptShardError` or OSError; targets may then be partly filled.

        `verified`: by `verify`, on this rank or another. `private`: nobody uses the targets when this raises. With
        neither, no byte reaches a target before its block is verified.
        """
        action = _Work.copy_windows if verified or private else _Work.copy
        _run(self._work(sharing, again=verified), action, progress)

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


Action = Callable[[_Work, memoryview, "memoryview | None"], None]


def _run(blocks: Sequence[_Work], action: Action, progress: Callable[[], None]) -> None:
    """Do it with all blocks on a few threads; the first error stops the rest and is raised.

    On this thread, with one buffer, where there is no memory for more: the step that overwrites must not fail for that.
    """
    if len(blocks) > 1 and _Pipeline(blocks, action, progress).run():
        return
    for item in blocks:
        with torch.no_grad(), _buffers(1) as (buffer,):
            action(item, buffer, item.fetch(buffer))
        progress()


class _Pipeline:
    """Some threads fetch blocks, others work on what has come, so that a disk never waits for a processor."""

    def __init__(
        self, blocks: Sequence[_Work], action: Action, progress: Callable[[], None]
    ) -> None:
        self._todo, self._lock = iter(blocks), threading.Lock()
        self._action, self._progress = action, progress
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[_Work, memoryview, memoryview | None] | None]
        self._ready = queue.SimpleQueue()
        many = sum(len(item.parts) for item in blocks) > _FEW * len(blocks)
        self._fetchers, self._workers = (1, 1) if many else (_FETCHERS, _WORKERS)
        self._fetching = self._fetchers
        self._error: BaseException | None = None
        self._stop = threading.Event()

    def run(self) -> bool:
        """Raises the first error, when all threads have ended. False: there is no room for them; do all without."""
        names = [self._fetch] * self._fetchers + [self._work] * self._workers
        threads = [threading.Thread(target=each, name="zero_ckpt-read") for each in names]
        try:
            with _buffers(_BUFFERS) as buffers:
                for buffer in buffers:
                    self._free.put(buffer)
                self._run_all(threads)
        except MemoryError:
            return False
        if self._error is not None:
            raise self._error
        return True

    def _run_all(self, threads: Sequence[threading.Thread]) -> None:
        try:
            for thread in threads:
                start_thread(thread)
            for thread in threads:
                thread.join()
        finally:  # after Ctrl-C, or without room for all, they must neither read on to the end nor wait for a buffer
            self._stop.set()
            for _ in range(self._fetchers):
                self._free.put(memoryview(b""))
            for thread in filter(threading.Thread.is_alive, threads):
                thread.join()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._stop.set()

    def _fetch(self) -> None:
        while True:
            buffer = self._free.get()
            with self._lock:
                item = None if self._stop.is_set() else next(self._todo, None)
            if item is None:
                break
            try:
                fetched = item.fetch(buffer)
            except BaseException as error:
                self._fail(error)
                break
            if fetched is None:
                self._act(item, buffer, None)
            else:
                self._ready.put((item, buffer, fetched))
        self._free.put(buffer)
        with self._lock:
            self._fetching -= 1
            if not self._fetching:
                self._ready.put(None)

    def _work(self) -> None:
        while (found := self._ready.get()) is not None:
            self._act(*found)
        self._ready.put(None)  # for the other workers

    def _act(self, item: _Work, buffer: memoryview, fetched: memoryview | None) -> None:
        try:
            if not self._stop.is_set():
                with torch.no_grad():
                    self._action(item, buffer, fetched)
                self._progress()
        except BaseException as error:
            self._fail(error)
        self._free.put(buffer)


@contextmanager
def _buffers(count: int) -> Iterator[list[memoryview]]:
    """Block-sized buffers, reused between loads."""
    found: list[memoryview] = []
    try:
        while len(found) < count:
            found.append(_spare.pop() if _spare else aligned_buffer(BLOCK))
        yield found
    finally:
        _spare.extend(found)


_spare: list[memoryview] = []


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


def _home(parts: Sequence[_Part], start: int, nbytes: int) -> memoryview | None:
    """The memory of the one target to which these bytes of the data section go as they are, if there is one."""
    for part in parts:
        first, last = _byte_span(part.chunk, part.overlap)
        if first <= start and start + nbytes <= last and (address := _direct_address(part)):
            return memoryview((ctypes.c_char * nbytes).from_address(address + start - first)).cast(
                "B"
            )
    return None


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
