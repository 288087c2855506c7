"""Bytes of a checkpoint by address: a file as it is, ranges of files end to end, bytes in memory, strided tensors.

A source has an address space that is read in blocks, as the core reads shard files. Knows nothing of what the bytes
mean; `file_table` says which sources a tag has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.memory import aligned_buffer, round_up
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.storage import FileReader, Storage
from zero_ckpt.core.tag_folder import ANOTHER_TAG
from zero_ckpt.errors import CorruptShardError
from zero_ckpt.interop.deepspeed.tensors import StoredTensor
from zero_ckpt.interop.deepspeed.torch_files import read_range

__all__ = ["Bytes", "FileSource", "Gathered", "Source", "Strided", "WholeBlocks", "read_bytes"]


class Source(Protocol):
    """An address space. `name`: what messages call it; no other source has the same. `nbytes`: its size."""

    name: str

    @property
    def nbytes(self) -> int: ...

    def read_block(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview:
        """Bytes `index * BLOCK` and following, at most `BLOCK`, in `buffer`. Raises `CorruptShardError`."""

    def close(self) -> None: ...


class WholeBlocks:
    """The reading side of a `StoredFile` over one source, which has no checksums to verify piece by piece."""

    _source: Source

    def read_block(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview:
        return self._source.read_block(index, buffer, keep)

    fetch = read_block

    def windows(
        self,
        index: int,
        memory: Callable[[int, int], memoryview],
        fetched: memoryview | None,
        keep: bool = False,
    ) -> Iterator[tuple[int, memoryview]]:
        assert fetched is not None  # `fetch` always reads
        yield index * BLOCK, fetched


@dataclass(slots=True)
class FileSource:
    """A file as it is; opened when it is first read, and again after a close."""

    files: Storage
    name: str
    nbytes: int
    _open: FileReader | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reader(self) -> FileReader:
        with self._lock:
            if self._open is None:
                self._open = self._opened()
            return self._open

    def _opened(self) -> FileReader:
        try:
            file = self.files.open(self.name)
        except OSError as error:
            raise _unreadable(self.name, error) from error
        if file.nbytes != self.nbytes:
            file.close()
            raise CorruptShardError(
                f"{self.name}: {self.nbytes} bytes expected, {file.nbytes} found: it was replaced while it was open"
            )
        return file

    def read_block(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview:
        begin = index * BLOCK
        nbytes = min(BLOCK, self.nbytes - begin)
        try:
            self.reader().read_into(begin, nbytes, buffer, keep)
        except (EOFError, OSError) as error:
            raise _unreadable(self.name, error) from error
        return buffer[:nbytes]

    def range(self, offset: int, nbytes: int) -> bytes:
        try:
            return read_range(self.reader(), offset, nbytes)
        except (EOFError, OSError) as error:
            raise _unreadable(self.name, error) from error

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _unreadable(name: str, error: Exception) -> CorruptShardError:
    return CorruptShardError(f"{name}: cannot be read: {error}. {ANOTHER_TAG}")


class Bytes:
    """Bytes in memory: numbers that no file holds as a tensor, and pickles of objects."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._data = bytearray()

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def add(self, data: bytes) -> int:
        """Add bytes; returns their address."""
        self._data += bytes(-len(self._data) % 16)
        begin = len(self._data)
        self._data += data
        return begin

    def read_block(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview:
        part = self._data[index * BLOCK : (index + 1) * BLOCK]
        buffer[: len(part)] = part
        return buffer[: len(part)]

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class _Extent:
    begin: int
    nbytes: int
    read: Callable[[int, int], bytes]

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


class Gathered:
    """Ranges of other sources end to end, each aligned."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self._extents: list[_Extent] = []

    def add(self, nbytes: int, read: Callable[[int, int], bytes]) -> int:
        """Add a range, of which `read(offset, nbytes)` gives bytes; returns its address."""
        begin = round_up(self.nbytes, 64)
        self._extents.append(_Extent(begin, nbytes, read))
        self.nbytes = begin + nbytes
        return begin

    def read_block(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview:
        begin = index * BLOCK
        end = min(begin + BLOCK, self.nbytes)
        for extent in self._extents:
            start, stop = max(begin, extent.begin), min(end, extent.end)
            if start < stop:
                data = extent.read(start - extent.begin, stop - start)
                buffer[start - begin : stop - begin] = data
        return buffer[: end - begin]

    def close(self) -> None:
        """Nothing is open here: the sources of the ranges are closed by their table."""


class Strided:
    """The elements of a strided tensor in row-major order. Holds the tensor while it is read."""

    def __init__(self, source: Source, tensor: StoredTensor) -> None:
        self.name = f"{source.name} (strided {tensor.storage.key}.{tensor.offset}.{tensor.strides})"
        self.nbytes = tensor.numel * itemsize(tensor.dtype)
        self._source, self._begin, self._size = source, tensor.begin, itemsize(tensor.dtype)
        self._shape, self._strides = tensor.shape, tensor.strides
        self._span = tensor.span - tensor.offset * self._size
        self._data: bytes | None = None

    def read_block(self, index: int, buffer: memoryview, keep: bool = False) -> memoryview:
        if self._data is None:
            self._data = self._gather()
        part = self._data[index * BLOCK : (index + 1) * BLOCK]
        buffer[: len(part)] = part
        return buffer[: len(part)]

    def _gather(self) -> bytes:
        import numpy as np

        memory = np.frombuffer(read_bytes(self._source, self._begin, self._span), dtype=np.uint8)
        view = np.lib.stride_tricks.as_strided(
            memory, (*self._shape, self._size), (*(s * self._size for s in self._strides), 1)
        )
        return np.ascontiguousarray(view).tobytes()

    def close(self) -> None:
        self._data = None


def read_bytes(source: Source, begin: int, nbytes: int) -> bytes:
    """Any bytes of a source."""
    if isinstance(source, FileSource):
        return source.range(begin, nbytes)
    buffer, found = aligned_buffer(BLOCK), bytearray()
    while len(found) < nbytes:
        at = begin + len(found)
        data = source.read_block(at // BLOCK, buffer)
        part = data[at % BLOCK : at % BLOCK + nbytes - len(found)]
        if not part:
            raise CorruptShardError(
                f"{source.name}: it ends at byte {at}, more expected. {ANOTHER_TAG}"
            )
        found += part
    return bytes(found)
