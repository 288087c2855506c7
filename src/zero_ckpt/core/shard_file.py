"""What a shard file is: a safetensors file with aligned data and a table of block checksums. Imports no torch.

    8 bytes   length N of the header, little-endian
    N bytes   JSON header, padded with spaces so that the data section starts on a 4096-byte boundary
    data      the chunks, without holes, in `stored_order`; then up to 7 bytes of padding (`__zero_ckpt_pad__`)
    table     `__zero_ckpt_blocks__`, U64: XXH3-64 of every 4 MiB block of the data, padding included

The header's `__metadata__` names the role, rank and world size, and in `chunks` the global place of every chunk that is
not a whole tensor, so a set of shard files describes itself. The file's checksum, kept in the manifest, is the XXH3-128
of header and table. Equal state gives equal bytes.

Owns where every byte goes, and computes it before any is read: no I/O here. `staging` fills such a file, `shard_reader`
opens one and `shard_header` checks what it says of itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.dtypes import itemsize, stored_dtype, stored_shape
from zero_ckpt.core.envelope import FORMAT_VERSION
from zero_ckpt.core.manifest import FileRecord
from zero_ckpt.core.memory import round_up

__all__ = [
    "BLOCK",
    "FIRST_BYTES",
    "MAX_HEADER",
    "PAD",
    "REMEDY",
    "TABLE",
    "Chunk",
    "ShardLayout",
    "file_checksum",
    "layout_shard",
    "stored_order",
]

BLOCK = 4 << 20
"""Bytes that one checksum covers, and the size of one read or write."""

_MOST_EVEN = 16 * BLOCK
"""Bytes. Of chunks that it divides, none gains from standing before another."""

REMEDY = "Run 'zero-ckpt verify' on the folder to list all damage; other tags are not affected."
"""The last sentence of errors about a damaged file."""

FIRST_BYTES = b'{"__metadata__":{"format":"zero_ckpt",'
"""How every header begins, behind its length."""

MAX_HEADER = 100_000_000
"""Bytes; the limit that safetensors readers have."""

PAD, TABLE = "__zero_ckpt_pad__", "__zero_ckpt_blocks__"
_RESERVED = frozenset({PAD, TABLE, "__metadata__"})


class Chunk(NamedTuple):
    """A chunk in a file: bytes `begin .. end` of the data section hold `box` of the tensor `key`."""

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where every byte of a file goes; known before any tensor is read."""

    header: bytes
    chunks: tuple[Chunk, ...]
    data_bytes: int

    @property
    def num_blocks(self) -> int:
        return -(-self.data_bytes // BLOCK)

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes + 8 * self.num_blocks

    def record(self, table: bytes) -> FileRecord:
        return FileRecord(self.nbytes, file_checksum(self.header, table))


def file_checksum(header: bytes | memoryview, table: bytes | memoryview) -> str:
    hasher = xxhash.xxh3_128(header)
    hasher.update(table)
    return hasher.hexdigest()


def stored_order(nbytes: int, is_whole: bool) -> tuple[int, bool]:
    """The sort key of a chunk of `nbytes`, `is_whole` if it is a whole tensor. Of equals the given order stays.

    The larger the power of two that divides a chunk's length, the earlier it stands. So each begins at a multiple of
    its own power: it is aligned to its elements, and the halves of a large one, which twice as many ranks will read,
    begin where blocks begin. (A block that belongs to two ranks is read and verified twice.) Among equals whole tensors
    come before parts of tensors: other ranks will read whole ones from here, such as an optimizer's `step` for each
    parameter, and should find them in few blocks.
    """
    power = min(nbytes & -nbytes, _MOST_EVEN) if nbytes else _MOST_EVEN
    return -power, not is_whole


def layout_shard(
    chunks: Iterable[tuple[str, str, tuple[int, ...], Box]], metadata: Mapping[str, str]
) -> ShardLayout:
    """Lay out (key, dtype, global shape, box) chunks, in `stored_order`."""
    items = sorted(
        chunks,
        key=lambda item: stored_order(item[3].numel * itemsize(item[1]), item[3].shape == item[2]),
    )
    counts: dict[str, int] = {}
    for key, *_ in items:
        counts[key] = counts.get(key, 0) + 1
    placed, at = [], 0
    taken = set(_RESERVED)
    for key, dtype, shape, box in items:
        name = key if counts[key] == 1 else f"{key}@{','.join(map(str, box.offset))}"
        while name in taken:  # the chunk table has the key, so a name need only be unique
            name += "~"
        taken.add(name)
        end = at + box.numel * itemsize(dtype)
        placed.append(Chunk(name, key, dtype, shape, box, at, end))
        at = end
    data_bytes = round_up(at, 8)
    return ShardLayout(_header(placed, at, data_bytes, metadata), tuple(placed), data_bytes)


def _header(chunks: list[Chunk], end: int, data_bytes: int, metadata: Mapping[str, str]) -> bytes:
    table = {c.name: _place(c) for c in chunks if not _is_plain(c)}
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": "zero_ckpt",
            "version": str(FORMAT_VERSION),
            **metadata,
            "chunks": json.dumps(table, separators=(",", ":")),
        }
    }
    for c in chunks:
        entries[c.name] = {
            "dtype": stored_dtype(c.dtype),
            "shape": stored_shape(c.dtype, c.box.shape),
            "data_offsets": (c.begin, c.end),
        }
    if data_bytes > end:
        pad = data_bytes - end
        entries[PAD] = {"dtype": "U8", "shape": (pad,), "data_offsets": (end, data_bytes)}
    blocks = -(-data_bytes // BLOCK)
    stop = data_bytes + 8 * blocks
    entries[TABLE] = {"dtype": "U64", "shape": (blocks,), "data_offsets": (data_bytes, stop)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = round_up(8 + len(text)) - 8
    if length > MAX_HEADER:
        raise ValueError(
            f"the header of one shard file would be {length} bytes; safetensors allows {MAX_HEADER}"
        )
    return struct.pack("<Q", length) + text.ljust(length)


def _is_plain(chunk: Chunk) -> bool:
    """Whether the safetensors entry alone says all: a whole tensor of a dtype that the format has."""
    return (
        chunk.name == chunk.key
        and chunk.box.shape == chunk.shape
        and stored_dtype(chunk.dtype) == chunk.dtype
    )


def _place(chunk: Chunk) -> dict[str, Any]:
    place: dict[str, Any] = {"shape": chunk.shape, "offset": chunk.box.offset}
    if chunk.name != chunk.key:
        place["key"] = chunk.key
    if stored_dtype(chunk.dtype) != chunk.dtype:
        place["dtype"] = chunk.dtype
    return place
