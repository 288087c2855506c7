"""An open shard file. Promises that every byte that leaves it is covered by a checksum. Imports no torch.

Length, header and block table are verified when it is opened, each block when it is read, and what differs is a
`CorruptShardError` that names file, block and tensors. Only `windows` gives bytes before their block is verified, and
says so. It reads what it is asked for and keeps nothing; what to read is decided by `reader`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import xxhash

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.manifest import FileRecord
from zero_ckpt.core.memory import ALIGNMENT, WINDOW, aligned_buffer
from zero_ckpt.core.shard_file import BLOCK, MAX_HEADER, REMEDY, Chunk, file_checksum
from zero_ckpt.core.shard_header import parse_header
from zero_ckpt.core.storage import FileReader, Storage
from zero_ckpt.errors import CorruptShardError

__all__ = ["ShardReader", "open_shard"]


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
        self.metadata, self.chunks, self.data_bytes = parse_header(header, name, file.nbytes)
        self.data_start = len(header)
        table = self._read(self.data_start + self.data_bytes, 8 * self.num_blocks)
        self.record = FileRecord(file.nbytes, file_checksum(header, table))
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
        """Block `index`, read into `buffer` at once and not verified; None where `windows` reads it in pieces."""
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
        """Any range of bytes. Storages read from aligned offsets only, so this begins at the one before."""
        start = offset - offset % ALIGNMENT
        with aligned_buffer(offset - start + nbytes) as buffer:
            try:
                self._file.read_into(start, offset - start + nbytes, buffer)
            except (EOFError, OSError) as error:
                raise CorruptShardError(f"{self.name}: {_reason(error)}. {REMEDY}") from error
            return bytes(buffer[offset - start : offset - start + nbytes])


def open_shard(
    storage: Storage, path: str, record: FileRecord | None, name: str = ""
) -> ShardReader:
    """Open and verify the file that the manifest lists with `record`. Errors call it `name`, or else `path`.

    Without a manifest, and so without a `record`: what the file says of itself is verified all the same.
    """
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
