"""Fills any range of an output file from the stored chunks that it needs. Every source block is verified.

Output is written front to back, so each shard file is read front to back too, and its last block is all that has to be
kept. With more shard files than `MAX_BLOCKS` some blocks are read again, from the page cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

import torch

from zero_ckpt.core.chunks import flat_range_boxes
from zero_ckpt.core.dtensors import TORCH_DTYPES
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.memory import aligned_buffer
from zero_ckpt.core.reader import Request, plan_reads
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.shards import ShardSet, StoredFile
from zero_ckpt.fp32.layout import FileLayout, Slot

__all__ = ["Assembler", "BlockCache"]

MAX_BLOCKS = 16
"""Blocks of 4 MiB that are kept: the most memory that reading takes."""


class BlockCache:
    """The last block of each shard file, verified, in memory that is used again: fresh memory is slow to touch."""

    def __init__(self, num_files: int) -> None:
        self._count = max(1, min(MAX_BLOCKS, num_files))
        self._reread = num_files > MAX_BLOCKS
        self._kept: OrderedDict[str, tuple[int, memoryview, memoryview]] = OrderedDict()

    def read(self, file: StoredFile, index: int) -> memoryview:
        """Block `index` of a file's data. Raises `CorruptShardError` or OSError."""
        kept = self._kept.pop(file.name, None)
        if kept is None or kept[0] != index:
            buffer = kept[2] if kept is not None else self._buffer()
            kept = index, file.read_block(index, buffer, self._reread), buffer
        self._kept[file.name] = kept
        return kept[1]

    def _buffer(self) -> memoryview:
        if len(self._kept) < self._count:
            return aligned_buffer(BLOCK)
        return self._kept.popitem(last=False)[1][2]


class Assembler:
    """One output file's bytes, made on demand."""

    def __init__(self, shards: ShardSet, cache: BlockCache, layout: FileLayout) -> None:
        self._shards, self._cache, self._layout = shards, cache, layout
        self._slot_ends = [slot.end for slot in layout.slots]
        self._literal_ends = [literal.end for literal in layout.literals]

    def fill(self, buffer: memoryview, begin: int, end: int) -> None:
        """Put bytes `begin .. end` of the file into the start of `buffer`. Both are multiples of 16, or the end."""
        layout = self._layout
        for literal in layout.literals[bisect_right(self._literal_ends, begin) :]:
            if literal.begin >= end:
                break
            start, stop = max(begin, literal.begin), min(end, literal.end)
            data = literal.data[start - literal.begin : stop - literal.begin]
            buffer[start - begin : stop - begin] = data
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
        requests: list[Request] = []
        for slot in layout.slots[bisect_right(self._slot_ends, begin) :]:
            if slot.begin >= end:
                break
            start, stop = max(begin, slot.begin), min(end, slot.end)
            requests += _requests(slot, start, flat[start - begin : stop - begin])
        plan_reads(self._shards, requests).fill_from(self._cache.read)


def _requests(slot: Slot, start: int, target: torch.Tensor) -> Sequence[Request]:
    """Reads that fill `target`, the bytes of the file from `start` on, all of them in the slot."""
    tensor = slot.tensor
    size, dtype = itemsize(tensor.dtype), TORCH_DTYPES[tensor.dtype]
    first = (start - slot.begin) // size
    found, at = [], 0
    for box in flat_range_boxes(tensor.shape, first, first + target.numel() // size):
        nbytes = box.numel * size
        part = target[at : at + nbytes].view(dtype).view(box.shape)
        found.append(Request(tensor.role, tensor.key, tensor.placed, box, part))
        at += nbytes
    return found
