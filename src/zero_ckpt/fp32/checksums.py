"""CRC-32 of the slots of one output file, summed up while their bytes pass by, on one thread or on several.

Each thread goes through its own range of the file front to back; where a slot lies in two ranges, the sums of its
parts are joined. So a checksum that stands in the file before all of its slot has passed by is known later.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right

from zero_ckpt.fp32.layout import FileLayout

__all__ = ["Checksums", "join_crc"]

_POLYNOMIAL = 0xEDB88320
"""The polynomial of CRC-32, lowest power first: bit 31 stands for 1, bit 30 for x."""


class Checksums:
    """The checksums of one file, for all threads that write it. A layout without checksums costs nothing."""

    def __init__(self, layout: FileLayout) -> None:
        self._places = layout.checksums
        self._slots = layout.slots if layout.checksums else ()
        self._slot_ends = [slot.end for slot in self._slots]
        self._place_ends = [place.begin + 4 for place in self._places]
        self._sums: list[dict[int, tuple[int, int]]] = [{} for _ in self._slots]
        self._lock = threading.Lock()

    def update(self, buffer: memoryview, begin: int, end: int) -> None:
        """Take in bytes `begin .. end` of the file, which follow what this thread gave before, or are some of that."""
        for number in range(bisect_right(self._slot_ends, begin), len(self._slots)):
            slot = self._slots[number]
            if slot.begin >= end:
                break
            start, stop = max(begin, slot.begin), min(end, slot.end)
            if start < stop:
                self._extend(self._sums[number], start, buffer[start - begin : stop - begin])

    def put(self, buffer: memoryview, begin: int, end: int) -> bool:
        """Fill in the checksums that stand in bytes `begin .. end`. Returns whether all of them are known by now."""
        for index in range(bisect_right(self._place_ends, begin), len(self._places)):
            place = self._places[index]
            if place.begin >= end:
                break
            crc = self._crc(place.slot)
            if crc is None:
                return False
            start, stop = max(begin, place.begin), min(end, place.begin + 4)
            data = crc.to_bytes(4, "little")
            buffer[start - begin : stop - begin] = data[start - place.begin : stop - place.begin]
        return True

    def _extend(self, sums: dict[int, tuple[int, int]], start: int, data: memoryview) -> None:
        """Add `data`, at byte `start`, to the sums of one slot: where each begins -> (where it ends, CRC between)."""
        with self._lock:
            if any(first <= start < stop for first, (stop, _) in sums.items()):
                return  # written once more
            first = next((first for first, (stop, _) in sums.items() if stop == start), start)
            crc = sums[first][1] if first in sums else 0
        crc = zlib.crc32(data, crc)
        with self._lock:
            sums[first] = start + len(data), crc

    def _crc(self, number: int) -> int | None:
        """The CRC-32 of a whole slot; None while bytes of it are missing."""
        slot, at, crc = self._slots[number], self._slots[number].begin, 0
        with self._lock:
            sums = sorted(self._sums[number].items())
        for first, (stop, part) in sums:
            if first != at:
                return None
            crc = join_crc(crc, part, stop - first) if at > slot.begin else part
            at = stop
        return crc if at == slot.end else None


def join_crc(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of two byte strings end to end, from the CRC-32 of each; the second string is `nbytes` long.

    Appending n bytes multiplies a CRC by x^(8n) modulo the polynomial; CRCs add up by exclusive or.
    """
    power, square, n = 1 << 31, 1 << 23, nbytes  # x^0, x^8
    while n:
        if n & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        n >>= 1
    return _multiply(first, power) ^ second


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
