"""Output files, byte for byte, before any tensor is read. Pure.

A file is slots, which stored tensors fill, and literals, which are known beforehand; together they cover it without a
hole. Checksums of slots stand behind them in the file, so that it can be written front to back in one pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from zero_ckpt.core.dtypes import NATIVE, itemsize
from zero_ckpt.core.memory import ALIGNMENT, round_up
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.shard_file import stored_order
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32.selection import OutTensor

__all__ = [
    "Checksum",
    "FileLayout",
    "Literal",
    "Slot",
    "divide",
    "in_shards",
    "in_stored_order",
    "layout_safetensors",
    "parse_size",
]


@dataclass(frozen=True, slots=True)
class Slot:
    """Bytes `begin .. end` of the file hold the tensor, row-major. `begin` is aligned to its elements."""

    tensor: OutTensor
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Literal:
    """Known bytes at `begin`."""

    begin: int
    data: bytes

    @property
    def end(self) -> int:
        return self.begin + len(self.data)


@dataclass(frozen=True, slots=True)
class Checksum:
    """The 4 bytes at `begin` hold the CRC-32 of slot number `slot`; they lie in a literal, where they are zero."""

    begin: int
    slot: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file of `nbytes` bytes. Slots, literals and checksums are each in ascending order."""

    nbytes: int
    slots: tuple[Slot, ...]
    literals: tuple[Literal, ...]
    checksums: tuple[Checksum, ...] = ()


def in_stored_order(tensors: Sequence[OutTensor]) -> list[OutTensor]:
    """An order in which every tensor is aligned to its elements and source files are read front to back.

    It is the order of the first file that a tensor has a chunk in. Where ranks have parts of unequal lengths others may
    be read with steps back, which costs a block that is read again.
    """
    return sorted(tensors, key=lambda t: (-itemsize(t.dtype), _stored_order(t.placed)))


def _stored_order(placed: Placed) -> tuple[int, bool]:
    shape = placed.runs[0].shape if placed.runs else placed.shape
    return stored_order(prod(shape) * itemsize(placed.dtype), shape == placed.shape)


def layout_safetensors(tensors: Sequence[OutTensor]) -> FileLayout:
    """A safetensors file. The format has no shared storage, so tied weights are written under each of their names.

    Format: https://huggingface.co/docs/safetensors. Raises `ConfigurationError` for a dtype that it lacks.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: list[Slot] = []
    at = 0
    for tensor in in_stored_order(tensors):
        if tensor.dtype not in NATIVE:
            raise ConfigurationError(
                f"tensor '{tensor.key}' has dtype {tensor.dtype}, which safetensors cannot hold; "
                "export with format='bin'"
            )
        for name in tensor.names:
            end = at + tensor.nbytes
            entries[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": (at, end),
            }
            relative.append(Slot(tensor, at, end))
            at = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    start = round_up(8 + len(header), ALIGNMENT)
    head = (start - 8).to_bytes(8, "little") + header.ljust(start - 8)
    slots = tuple(Slot(s.tensor, start + s.begin, start + s.end) for s in relative)
    return FileLayout(start + at, slots, (Literal(0, head),))


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Bytes: `5GB` is 5 * 10**9, `5GiB` is 5 * 2**30. Raises `ConfigurationError`."""
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is not None:
        power = " KMGT".index(match[2].upper() or " ")
        nbytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    else:
        nbytes = size if isinstance(size, int) else 0
    if nbytes <= 0:
        raise ConfigurationError(
            f"max_shard_size is a number of bytes or a text like '5GB' or '500MiB', found {size!r}"
        )
    return nbytes


def in_shards(tensors: Sequence[OutTensor], limit: int, copies: bool) -> list[list[OutTensor]]:
    """Consecutive groups of at most `limit` bytes; a larger tensor is a group of its own.

    `copies`: tied names take their bytes again. Weights that are tied stay in one group.
    """
    shards: list[list[OutTensor]] = []
    room = 0
    for tensor in tensors:
        nbytes = tensor.nbytes * (len(tensor.names) if copies else 1)
        if not shards or nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= nbytes
    return shards


def divide(sizes: Sequence[int], workers: int, unit: int) -> list[list[tuple[int, int, int]]]:
    """For each worker the (file, begin, end) that it writes: about equal bytes, cut at multiples of `unit`."""
    total = sum(sizes)
    shares: list[list[tuple[int, int, int]]] = []
    for worker in range(workers):
        low, high = (total * w // workers for w in (worker, worker + 1))
        share, start = [], 0
        for index, size in enumerate(sizes):
            begin, end = (_cut(at - start, size, unit) for at in (low, high))
            if begin < end:
                share.append((index, begin, end))
            start += size
        shares.append(share)
    return shares


def _cut(at: int, size: int, unit: int) -> int:
    """`at` within a file of `size` bytes: its end stays, anything else is rounded down to `unit`."""
    return size if at >= size else max(0, at) // unit * unit
