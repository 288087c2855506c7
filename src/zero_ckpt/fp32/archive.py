"""A zip archive, byte for byte, before the data of its large records is known. Pure.

Records are stored uncompressed and aligned to 64 bytes, as `torch.load(mmap=True)` wants them. The CRC-32 of a record
that a tensor fills comes behind its data (a data descriptor) and in the central directory, so that the archive can be
written front to back in one pass. Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, section 4.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from zero_ckpt.fp32.layout import Checksum, FileLayout, Literal, Slot
from zero_ckpt.fp32.selection import OutTensor

__all__ = ["Archive"]

RECORD_ALIGNMENT = 64
_UTF8_NAME, _HAS_DESCRIPTOR = 0x0800, 0x0008
_LIMIT32, _LIMIT16 = 0xFFFFFFFF, 0xFFFF
_VERSION, _VERSION_ZIP64 = 20, 45
_DATE = 0x0021  # 1980-01-01, the earliest: equal content gives equal bytes
_ZIP64_FIELD, _PADDING_FIELD = 0x0001, 0x4246
_CRC_IN_DESCRIPTOR, _CRC_IN_DIRECTORY = 4, 16


@dataclass(frozen=True, slots=True)
class _Record:
    """What the central directory says of a record. `slot`: the number of the slot whose CRC-32 is not known yet."""

    name: bytes
    begin: int
    nbytes: int
    flags: int
    crc: int
    slot: int | None


class Archive:
    """Add records in order, then `finish`. `prefix`: the folder in the archive that all records lie in."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._at = 0
        self._records: list[_Record] = []
        self._slots: list[Slot] = []
        self._literals: list[Literal] = []
        self._checksums: list[Checksum] = []

    def add_bytes(self, name: str, data: bytes) -> None:
        self._header(name, len(data), 0, zlib.crc32(data), None)
        self._put(data)

    def add_tensor(self, name: str, tensor: OutTensor) -> None:
        nbytes = tensor.nbytes
        if nbytes == 0:
            self.add_bytes(name, b"")
            return
        number = len(self._slots)
        self._header(name, nbytes, _HAS_DESCRIPTOR, 0, number)
        self._slots.append(Slot(tensor, self._at, self._at + nbytes))
        self._at += nbytes
        self._checksums.append(Checksum(self._at + _CRC_IN_DESCRIPTOR, number))
        sizes = "QQ" if nbytes >= _LIMIT32 else "II"
        self._put(struct.pack(f"<4sI{sizes}", b"PK\x07\x08", 0, nbytes, nbytes))

    def finish(self) -> FileLayout:
        start = self._at
        for record in self._records:
            if record.slot is not None:
                self._checksums.append(Checksum(self._at + _CRC_IN_DIRECTORY, record.slot))
            self._put(_directory_entry(record))
        self._put(_end_of_directory(len(self._records), start, self._at))
        literals, checksums = tuple(self._literals), tuple(self._checksums)
        return FileLayout(self._at, tuple(self._slots), literals, checksums)

    def _put(self, data: bytes) -> None:
        self._literals.append(Literal(self._at, data))
        self._at += len(data)

    def _header(self, name: str, nbytes: int, flags: int, crc: int, slot: int | None) -> None:
        """The local header, padded so that the data behind it is aligned."""
        path = f"{self._prefix}/{name}".encode()
        record = _Record(path, self._at, nbytes, flags | _UTF8_NAME, crc, slot)
        self._records.append(record)
        big = nbytes >= _LIMIT32
        extra = struct.pack("<HHQQ", _ZIP64_FIELD, 16, nbytes, nbytes) if big else b""
        padding = -(self._at + 30 + len(path) + len(extra) + 4) % RECORD_ALIGNMENT
        extra += struct.pack("<HH", _PADDING_FIELD, padding) + b"\0" * padding
        size = min(nbytes, _LIMIT32)
        version = _VERSION_ZIP64 if big else _VERSION
        fields = (version, record.flags, 0, 0, _DATE, crc, size, size, len(path), len(extra))
        self._put(struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields) + path + extra)


def _directory_entry(record: _Record) -> bytes:
    large = [n for n in (record.nbytes, record.nbytes, record.begin) if n >= _LIMIT32]
    extra = b""
    if large:
        extra = struct.pack(f"<HH{len(large)}Q", _ZIP64_FIELD, 8 * len(large), *large)
    version = _VERSION_ZIP64 if large else _VERSION
    size, begin = min(record.nbytes, _LIMIT32), min(record.begin, _LIMIT32)
    head = (version, version, record.flags, 0, 0, _DATE, record.crc, size, size)
    tail = (len(record.name), len(extra), 0, 0, 0, 0, begin)
    return struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *head, *tail) + record.name + extra


def _end_of_directory(count: int, start: int, end: int) -> bytes:
    data = b""
    if count >= _LIMIT16 or end >= _LIMIT32:
        fields = (44, _VERSION_ZIP64, _VERSION_ZIP64, 0, 0, count, count, end - start, start)
        data += struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", *fields)
        data += struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    short, size, at = min(count, _LIMIT16), min(end - start, _LIMIT32), min(start, _LIMIT32)
    return data + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, short, short, size, at, 0)
