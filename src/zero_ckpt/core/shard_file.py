"""One shard file: a safetensors file with aligned data and a table of block checksums. Imports no torch.

    8 bytes   length N of the header, little-endian
    N bytes   JSON header, padded with spaces so that the data section starts on a 4096-byte boundary
    data      the chunks, widest dtype first, without holes; then up to 7 bytes of padding (`__zero_ckpt_pad__`)
    table     `__zero_ckpt_blocks__`, U64: XXH3-64 of every 4 MiB block of the data, padding included

The header's `__metadata__` names the role, rank and world size, and in `chunks` the global place of every chunk that is
not a whole tensor, so a set of shard files describes itself. The file's checksum, kept in the manifest, is the XXH3-128
of header and table. Equal state gives equal bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import xxhash

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.dtypes import ITEMSIZE, itemsize, stored_dtype, stored_shape
from zero_ckpt.core.layout import MAX_DIMS
from zero_ckpt.core.manifest import FORMAT_VERSION, FileRecord
from zero_ckpt.core.memory import ALIGNMENT, WINDOW, aligned_buffer, round_up
from zero_ckpt.core.storage import FileReader, Storage
from zero_ckpt.errors import CorruptShardError

__all__ = [
    "BLOCK",
    "REMEDY",
    "Chunk",
    "ShardLayout",
    "ShardReader",
    "layout_shard",
    "open_shard",
]

BLOCK = 4 << 20
"""Bytes that one checksum covers, and the size of one read or write."""

MAX_HEADER = 100_000_000
"""Bytes; the limit that safetensors readers have."""

_PAD, _TABLE = "__zero_ckpt_pad__", "__zero_ckpt_blocks__"
_RESERVED = frozenset({_PAD, _TABLE, "__metadata__"})


@dataclass(frozen=True, slots=True)
class Chunk:
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
        return FileRecord(self.nbytes, _file_checksum(self.header, table))


def _file_checksum(header: bytes | memoryview, table: bytes | memoryview) -> str:
    hasher = xxhash.xxh3_128(header)
    hasher.update(table)
    return hasher.hexdigest()


def layout_shard(
    chunks: Iterable[tuple[str, str, tuple[int, ...], Box]], metadata: Mapping[str, str]
) -> ShardLayout:
    """Lay out (key, dtype, global shape, box) chunks.

    Order: widest dtype first, so that every chunk is aligned to its element; of one width, whole tensors before parts
    of tensors: what every rank has, such as an optimizer's `step` of each parameter, other ranks will read from here,
    and they should find it in few blocks. Else as given.
    """
    items = sorted(chunks, key=lambda item: (-itemsize(item[1]), item[3].shape != item[2]))
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
        entries[_PAD] = {"dtype": "U8", "shape": (pad,), "data_offsets": (end, data_bytes)}
    blocks = -(-data_bytes // BLOCK)
    stop = data_bytes + 8 * blocks
    entries[_TABLE] = {"dtype": "U64", "shape": (blocks,), "data_offsets": (data_bytes, stop)}
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


class ShardReader:
    """An open shard file whose length, header and block table have been verified.

    Raises `CorruptShardError` for anything that differs from the manifest's record or from the format.
    """

    def __init__(self, file: FileReader, name: str, record: FileRecord | None) -> None:
        self._file = file
        self.name = name
        if record is not None and file.nbytes != record.nbytes:
            raise CorruptShardError(
                f"{name}: {record.nbytes} bytes expected, {file.nbytes} found: the file is truncated "
                f"or was replaced. {REMEDY}"
            )
        header = self._read_header()
        self.metadata, self.chunks, self.data_bytes = _parse_header(header, name, file.nbytes)
        self.data_start = len(header)
        table = self._read(self.data_start + self.data_bytes, 8 * self.num_blocks)
        self.record = FileRecord(file.nbytes, _file_checksum(header, table))
        if record is not None and self.record.checksum != record.checksum:
            raise CorruptShardError(
                f"{name}: header and block table: checksum {record.checksum} expected, "
                f"{self.record.checksum} found. {REMEDY}"
            )
        self._table = struct.unpack(f"<{self.num_blocks}Q", table)
        self._places = {(c.key, c.box.offset): c for c in self.chunks}

    @property
    def num_blocks(self) -> int:
        return -(-self.data_bytes // BLOCK)

    def find(self, key: str, box: Box) -> Chunk:
        """The chunk of `key` that holds exactly `box`."""
        chunk = self._places.get((key, box.offset))
        if chunk is None or chunk.box != box:
            found = "no such chunk" if chunk is None else f"shape {list(chunk.box.shape)}"
            raise CorruptShardError(
                f"{self.name}: tensor '{key}': a chunk at {list(box.offset)} of shape {list(box.shape)} "
                f"expected by the manifest, {found} found. {REMEDY}"
            )
        return chunk

    def block_bytes(self, index: int) -> int:
        return min(BLOCK, self.data_bytes - index * BLOCK)

    def read_block(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview:
        """Block `index` of the data, verified, in `buffer` (aligned, at least `BLOCK` long)."""
        fetched, begin = self.fetch(index, buffer, keep), index * BLOCK
        for _ in self.windows(index, lambda start, _: buffer[start - begin :], fetched, keep):
            pass
        return buffer[: self.block_bytes(index)]

    def fetch(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview | None:
        """Block `index` in `buffer`, not verified, where every read is a journey; None where `windows` reads it."""
        start, nbytes = self.data_start + index * BLOCK, self.block_bytes(index)
        if self._file.expect(start, nbytes, keep) < nbytes:
            return None
        self._fetch(index, 0, nbytes, buffer, keep)
        return buffer[:nbytes]

    def windows(
        self,
        index: int,
        memory: Callable[[int, int], memoryview],
        fetched: memoryview | None,
        keep: bool = False,
    ) -> Iterator[tuple[int, memoryview]]:
        """Block `index` in pieces that fit a core's cache: (first byte in the data section, bytes).

        `fetched`: what `fetch` returned. If None, a piece is read into `memory(first byte, number of bytes)`, which is
        cheaper than to read the block first. Only after the last piece is the block known to be as it was saved: this
        is for bytes that were verified before, that are only looked at, or that nobody uses when this raises
        `CorruptShardError`.
        """
        begin, stop, hasher = index * BLOCK, self.block_bytes(index), xxhash.xxh3_64()
        for at in range(0, stop, WINDOW):
            nbytes = min(WINDOW, stop - at)
            if fetched is None:
                piece = memory(begin + at, nbytes)[:nbytes]
                self._fetch(index, at, nbytes, piece, keep)
            else:
                piece = fetched[at : at + nbytes]
            hasher.update(piece)
            yield begin + at, piece
        if hasher.intdigest() != self._table[index]:
            raise CorruptShardError(self._damage(index, hasher.intdigest()))

    def _fetch(self, index: int, at: int, nbytes: int, buffer: memoryview, keep: bool) -> None:
        try:
            self._file.read_into(self.data_start + index * BLOCK + at, nbytes, buffer, keep)
        except (EOFError, OSError) as error:
            raise CorruptShardError(
                f"{self.name}: block {index}: {_reason(error)}. {REMEDY}"
            ) from error

    def read_entry(self, key: str) -> bytes:
        """All bytes of the chunk `key`, verified. For small entries: it copies, and keeps them in memory."""
        chunk = next((c for c in self.chunks if c.key == key), None)
        if chunk is None:
            raise CorruptShardError(f"{self.name}: no entry '{key}', which its objects name")
        buffer = aligned_buffer(BLOCK)
        parts = []
        for index in range(chunk.begin // BLOCK, -(-chunk.end // BLOCK)):
            data = self.read_block(index, buffer)
            start = max(chunk.begin - index * BLOCK, 0)
            parts.append(bytes(data[start : chunk.end - index * BLOCK]))
        return b"".join(parts)

    def _damage(self, index: int, found: int) -> str:
        start = index * BLOCK
        stop = start + self.block_bytes(index)
        names = [c.key for c in self.chunks if c.begin < stop and c.end > start]
        tensors = ", ".join(f"'{n}'" for n in names[:2]) + (" ..." if len(names) > 2 else "")
        plural = "s" if len(names) > 1 else ""
        return (
            f"{self.name}: block {index} (bytes {self.data_start + start}-{self.data_start + stop}, tensor{plural} "
            f"{tensors}): checksum {self._table[index]:016x} expected, {found:016x} found. {REMEDY}"
        )

    def close(self) -> None:
        self._file.close()

    def _read_header(self) -> bytes:
        length = struct.unpack("<Q", self._read(0, 8))[0] if self._file.nbytes >= 8 else 0
        if (
            not 0 < length <= min(MAX_HEADER, self._file.nbytes - 8)
            or (8 + length) % ALIGNMENT != 0
        ):
            raise CorruptShardError(
                f"{self.name}: a header length that fits the file's {self._file.nbytes} bytes expected, "
                f"{length} found: not a shard file, or damaged. {REMEDY}"
            )
        return self._read(0, 8 + length)

    def _read(self, offset: int, nbytes: int) -> bytes:
        """Any range. Shard files align only blocks, so this reads from the aligned offset before."""
        start = offset - offset % ALIGNMENT
        with aligned_buffer(offset - start + nbytes) as buffer:
            try:
                self._file.read_into(start, offset - start + nbytes, buffer)
            except (EOFError, OSError) as error:
                raise CorruptShardError(f"{self.name}: {_reason(error)}. {REMEDY}") from error
            return bytes(buffer[offset - start : offset - start + nbytes])


def open_shard(storage: Storage, path: str, record: FileRecord, name: str = "") -> ShardReader:
    """Open and verify the file that the manifest lists with `record`. Errors call it `name`, or else `path`."""
    name = name or path
    try:
        file = storage.open(path)
    except FileNotFoundError as error:
        raise CorruptShardError(
            f"{name}: missing, although the manifest lists it. {REMEDY}"
        ) from error
    except OSError as error:
        raise CorruptShardError(f"{name}: {_reason(error)}. {REMEDY}") from error
    try:
        return ShardReader(file, name, record)
    except BaseException:
        file.close()
        raise


def _reason(error: Exception) -> str:
    """Why bytes could not be read. The caller names the file."""
    text = error.strerror if isinstance(error, OSError) else None
    return f"cannot be read: {text}" if text else str(error)


REMEDY = "Run 'zero-ckpt verify' on the folder to list all damage; other tags are not affected."


def _parse_header(
    header: bytes, name: str, file_bytes: int
) -> tuple[dict[str, str], tuple[Chunk, ...], int]:
    """(metadata, chunks, bytes of data) of a header, with every number checked."""
    try:
        entries = json.loads(header[8:])
        metadata = entries.pop("__metadata__")
        places = json.loads(metadata["chunks"])
        entries.pop(_PAD, None)
        data_bytes, stop = entries.pop(_TABLE)["data_offsets"]
        geometries = _Geometries()
        found = [
            (name, *geometries.of(name, entry, places.get(name))) for name, entry in entries.items()
        ]
        if not all(type(n) is int and n >= 0 for n in (data_bytes, stop)):
            raise ValueError("the block table has no place")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptShardError(
            f"{name}: the header is damaged, or not that of a zero_ckpt shard file ({error!r}). {REMEDY}"
        ) from error
    expected = len(header) + data_bytes + 8 * -(-data_bytes // BLOCK)
    if expected != file_bytes or len(header) + stop != file_bytes:
        raise CorruptShardError(
            f"{name}: {expected} bytes expected from its header, {file_bytes} found. {REMEDY}"
        )
    chunks, at = [], 0
    for entry_name, key, geometry, offsets in found:
        begin, at = at, at + geometry.nbytes
        if offsets != [begin, at] or begin % itemsize(geometry.dtype):
            raise CorruptShardError(
                f"{name}: tensor '{entry_name}': its bytes {offsets} do not follow byte {begin} "
                f"or do not fit shape {list(geometry.box.shape)} of {geometry.dtype}. {REMEDY}"
            )
        chunks.append(
            Chunk(entry_name, key, geometry.dtype, geometry.shape, geometry.box, begin, at)
        )
    if not 0 <= data_bytes - at < 8:
        raise CorruptShardError(f"{name}: the chunks end at byte {at} of {data_bytes}. {REMEDY}")
    return metadata, tuple(chunks), data_bytes


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What many chunks have in common."""

    dtype: str
    shape: tuple[int, ...]
    box: Box
    nbytes: int


class _Geometries:
    """The geometries of a header's entries, each checked once: layers repeat."""

    def __init__(self) -> None:
        self._known: dict[Any, _Geometry] = {}

    def of(
        self, name: str, entry: dict[str, Any], place: dict[str, Any] | None
    ) -> tuple[str, _Geometry, list[int]]:
        """(key, geometry, unchecked data offsets) of an entry. Raises ValueError and the like for nonsense."""
        kind, stored, place = entry["dtype"], tuple(entry["shape"]), place or {}
        shape, offset = tuple(place.get("shape", "?")), tuple(place.get("offset", "?"))
        told = kind, stored, place.get("dtype"), shape, offset
        geometry = self._known.get(told)
        if geometry is None:
            geometry = self._known[told] = _geometry(name, kind, stored, place)
        key = place.get("key", name)
        if not isinstance(key, str):
            raise ValueError(f"entry '{name}' has no name")
        return key, geometry, entry["data_offsets"]


def _geometry(name: str, kind: str, stored: tuple[int, ...], place: dict[str, Any]) -> _Geometry:
    dtype = place.get("dtype", kind)
    box_shape = stored if dtype == kind else stored[:-1]
    shape = tuple(place.get("shape", box_shape))
    offset = tuple(place.get("offset", (0,) * len(shape)))
    numbers = (0, *box_shape, *shape, *offset)
    if {*map(type, numbers)} != {int} or not 0 <= min(numbers) <= max(numbers) < 1 << 63:
        raise ValueError(f"entry '{name}' is not made of natural numbers")
    if dtype not in ITEMSIZE:
        raise ValueError(f"entry '{name}' has no known dtype")
    if kind != stored_dtype(dtype) or stored != stored_shape(dtype, box_shape):
        raise ValueError(f"entry '{name}' does not hold elements of {dtype}")
    if len(shape) > MAX_DIMS or not len(shape) == len(offset) == len(box_shape):
        raise ValueError(f"entry '{name}' has different numbers of dimensions")
    if prod(box_shape) and any(a + n > s for a, n, s in zip(offset, box_shape, shape, strict=True)):
        raise ValueError(f"entry '{name}' reaches outside of its tensor")
    box = Box(offset, box_shape)
    return _Geometry(dtype, shape, box, box.numel * itemsize(dtype))
