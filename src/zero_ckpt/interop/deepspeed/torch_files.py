"""Files that `torch.save` wrote, opened without torch: the tree of values at once, the bytes of tensors when wanted.

A file is a zip archive with uncompressed records (`data.pkl`, and one record for each storage), or, when DeepSpeed was
told `checkpoint_serialization: false`, the older format: pickles, then the storages one after the other. Either way
a storage is a range of the file, and nothing of it is read here.

Formats: https://docs.pytorch.org/docs/stable/notes/serialization.html, and APPNOTE.TXT (zip), section 4.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any

from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.memory import ALIGNMENT, aligned_buffer
from zero_ckpt.core.storage import FileReader
from zero_ckpt.core.storage import Storage as Files
from zero_ckpt.core.tag_folder import ANOTHER_TAG
from zero_ckpt.errors import CorruptShardError, UnsafeObjectError
from zero_ckpt.interop.deepspeed.pickle_reader import load_pickle
from zero_ckpt.interop.deepspeed.plain import CONSTRUCTORS, STORAGE_DTYPES
from zero_ckpt.interop.deepspeed.records import Global, PickleError
from zero_ckpt.interop.deepspeed.tensors import Storage

__all__ = ["TorchFile", "open_torch_file", "read_range"]


MAX_PICKLE = 1 << 28
"""Bytes of a pickle; it holds names and shapes, and whatever the client state has. More is refused."""

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(slots=True)
class TorchFile:
    """An opened file. `tree`: what was saved, with `StoredTensor`s for its tensors.

    `records`: (name, begin, bytes, CRC-32) of each storage in a zip archive.
    """

    path: str
    nbytes: int
    tree: Any
    records: list[tuple[str, int, int, int]] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)


def open_torch_file(files: Files, path: str, number: int) -> TorchFile:
    """Open `path`; the storages of its tensors say that they lie in file `number`.

    Raises `CorruptShardError` for a damaged or foreign file, `UnsafeObjectError` for an attack.
    """
    try:
        file = files.open(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CorruptShardError(f"{path}: cannot be read: {reason}. {ANOTHER_TAG}") from error
    try:
        return _Opening(file, path, number).open()
    except UnsafeObjectError as error:
        raise UnsafeObjectError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise CorruptShardError(
            f"{path}: a file written by torch.save expected, {file.nbytes} bytes found that are none, or damaged: "
            f"{error}. {ANOTHER_TAG}"
        ) from error
    finally:
        file.close()


_DAMAGE = (
    PickleError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    struct.error,
    NotImplementedError,
    RecursionError,
)


def read_range(file: FileReader, offset: int, nbytes: int) -> bytes:
    """Any bytes of a file. Raises EOFError when it ends before."""
    if offset < 0 or offset + nbytes > file.nbytes:
        raise EOFError(f"bytes {offset}-{offset + nbytes} expected, the file ends at {file.nbytes}")
    start = offset - offset % ALIGNMENT
    with aligned_buffer(offset - start + nbytes) as buffer:
        file.read_into(start, offset - start + nbytes, buffer, True)
        return bytes(buffer[offset - start : offset - start + nbytes])


class _Stream(io.RawIOBase):
    """A `FileReader` as the stream that `zipfile` wants."""

    def __init__(self, file: FileReader) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.nbytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        count = max(0, min(len(view), self._file.nbytes - self._at))
        if count:
            view[:count] = read_range(self._file, self._at, count)
        self._at += count
        return count


class _Opening:
    """One file while it is opened: the storages that its pickle names."""

    def __init__(self, file: FileReader, path: str, number: int) -> None:
        self._file, self._path, self._number = file, path, number
        self._storages: dict[str, Storage] = {}

    def open(self) -> TorchFile:
        if read_range(self._file, 0, min(4, self._file.nbytes)) == b"PK\x03\x04":
            return self._open_zip()
        return self._open_legacy()

    def _storage(self, persistent_id: Any) -> Storage:
        kind, storage_class, key, _location, numel = persistent_id[:5]
        if kind != "storage" or not isinstance(storage_class, Global):
            raise PickleError(f"a storage expected, {kind!r} found")
        dtype = STORAGE_DTYPES.get(storage_class.name)
        if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise PickleError(f"a storage of class '{storage_class.path}', which is not opened")
        storage = self._storages.get(key)
        if storage is None:
            storage = Storage(dtype, numel * itemsize(dtype), key, self._number)
            self._storages[key] = storage
        elif storage.nbytes < numel * itemsize(dtype):
            raise PickleError(f"storage '{key}' has two sizes")
        return storage

    def _load(self, data: bytes, start: int = 0) -> tuple[Any, int]:
        return load_pickle(data, CONSTRUCTORS, self._storage, start)

    def _open_zip(self) -> TorchFile:
        with zipfile.ZipFile(io.BufferedReader(_Stream(self._file))) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            packed = [info.filename for info in infos.values() if info.compress_type]
            if packed:
                raise PickleError(f"record '{packed[0]}' is compressed")
            name = next((n for n in infos if n == "data.pkl" or n.endswith("/data.pkl")), None)
            if name is None:
                raise PickleError("the archive holds no 'data.pkl'")
            if infos[name].file_size > MAX_PICKLE:
                raise PickleError(f"'{name}' has {infos[name].file_size} bytes")
            prefix = name.removesuffix("data.pkl")
            if f"{prefix}byteorder" in infos:
                order = archive.read(infos[f"{prefix}byteorder"])
                if order != b"little":
                    raise PickleError(f"byte order 'little' expected, {order[:16]!r} found")
            tree, _ = self._load(archive.read(infos[name]))
        found = TorchFile(self._path, self._file.nbytes, tree)
        found.storages = list(self._storages.values())
        for key, storage in self._storages.items():
            info = infos.get(f"{prefix}data/{key}")
            if info is None:
                raise PickleError(f"no record 'data/{key}', which the pickle names")
            if info.file_size < storage.nbytes:
                raise PickleError(
                    f"record 'data/{key}': {storage.nbytes} bytes expected, {info.file_size} found"
                )
            storage.begin = self._data_offset(info)
            self._check_range(storage)
            found.records.append((info.filename, storage.begin, info.file_size, info.CRC))
        return found

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        head = read_range(self._file, info.header_offset, 30)
        if head[:4] != b"PK\x03\x04":
            raise PickleError(f"record '{info.filename}' does not begin where the archive says")
        name, extra = struct.unpack("<HH", head[26:30])
        return info.header_offset + 30 + int(name) + int(extra)

    def _check_range(self, storage: Storage) -> None:
        end = storage.begin + storage.nbytes
        if end > self._file.nbytes:
            raise PickleError(
                f"storage '{storage.key}' ends at byte {end}, the file at {self._file.nbytes}"
            )

    def _open_legacy(self) -> TorchFile:
        """Grows the part that is held until the pickles end within it."""
        held = 1 << 20
        while True:
            self._storages.clear()
            data = read_range(self._file, 0, min(held, self._file.nbytes))
            try:
                return self._parse_legacy(data)
            except PickleError:
                if len(data) == self._file.nbytes or held >= MAX_PICKLE:
                    raise
                held *= 4

    def _parse_legacy(self, data: bytes) -> TorchFile:
        magic, at = self._load(data)
        if magic != _MAGIC:
            raise PickleError("neither a zip archive nor torch's older format")
        protocol, at = self._load(data, at)
        system, at = self._load(data, at)
        if protocol != _LEGACY_PROTOCOL or not system.get("little_endian", True):
            raise PickleError("torch's older format, of another version or byte order")
        tree, at = self._load(data, at)
        keys, at = self._load(data, at)
        for key in keys:
            storage = self._storages.get(key)
            if storage is None:
                raise PickleError(f"storage '{key}' belongs to no tensor")
            (numel,) = struct.unpack("<q", read_range(self._file, at, 8))
            if numel * itemsize(storage.dtype) != storage.nbytes:
                raise PickleError(f"storage '{key}' has two sizes")
            storage.begin = at + 8
            self._check_range(storage)
            at = storage.begin + storage.nbytes
        return TorchFile(
            self._path, self._file.nbytes, tree, storages=list(self._storages.values())
        )
