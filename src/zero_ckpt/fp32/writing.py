"""Writes a range of an output file: the next window is assembled while the last is written, past the page cache.

Extra memory is that of a few windows, used again and again, and of the block cache, whatever the file's size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from zero_ckpt.core.staging import StagingPool, WriteThreads
from zero_ckpt.core.storage import FileWriter
from zero_ckpt.fp32.assembly import Assembler
from zero_ckpt.fp32.layout import FileLayout

__all__ = ["WINDOW", "write_range"]

WINDOW = 4 << 20
"""Bytes that are assembled and written at once; as long as a buffer of the `StagingPool`."""


def write_range(
    writer: FileWriter,
    layout: FileLayout,
    assembler: Assembler,
    begin: int,
    end: int,
    pool: StagingPool,
    written: Callable[[int], bool],
) -> None:
    """Write bytes `begin .. end`; `begin` is a multiple of `WINDOW`, and 0 for a layout with checksums.

    `written(nbytes)` is called after each window and says whether to go on. Raises what reading or writing raised; the
    writer stays open.
    """
    checksums = _Checksums(layout)
    threads = WriteThreads(writer, pool, lambda: None)
    try:
        for start in range(begin, end, WINDOW):
            if threads.error is not None:
                break
            stop = min(start + WINDOW, end)
            buffer = pool.take()
            try:
                assembler.fill(buffer, start, stop)
                checksums.update(buffer, start, stop)
            except BaseException:
                pool.give(buffer)
                raise
            threads.put(start, buffer, stop - start)
            if not written(stop - start):
                break
    finally:
        threads.join()


class _Checksums:
    """CRC-32 of slots, summed up while their bytes pass by, and put where the layout wants them."""

    def __init__(self, layout: FileLayout) -> None:
        self._slots = layout.slots
        self._places = layout.checksums
        self._crc = [0] * len(self._slots) if self._places else []
        self._next_slot = self._next_place = 0

    def update(self, buffer: memoryview, begin: int, end: int) -> None:
        """Take in bytes `begin .. end` of the file, the next ones, and complete them."""
        if not self._places:
            return
        while self._next_slot < len(self._slots):
            slot = self._slots[self._next_slot]
            start, stop = max(begin, slot.begin), min(end, slot.end)
            if start < stop:
                data = buffer[start - begin : stop - begin]
                self._crc[self._next_slot] = zlib.crc32(data, self._crc[self._next_slot])
            if slot.end > end:
                break
            self._next_slot += 1
        while self._next_place < len(self._places):
            place = self._places[self._next_place]
            start, stop = max(begin, place.begin), min(end, place.begin + 4)
            if start < stop:
                crc = self._crc[place.slot].to_bytes(4, "little")
                buffer[start - begin : stop - begin] = crc[start - place.begin : stop - place.begin]
            if place.begin + 4 > end:
                break
            self._next_place += 1
