"""Sums of slots whose bytes pass by in parts, in any order of the ranges, are those of the whole."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from zero_ckpt.core.planner import Placed
from zero_ckpt.fp32.checksums import Checksums, join_crc
from zero_ckpt.fp32.layout import Checksum, FileLayout, Slot
from zero_ckpt.fp32.selection import stored_tensor


@given(st.binary(), st.binary())
def test_sums_of_two_strings_give_that_of_both(first: bytes, second: bytes) -> None:
    joined = join_crc(zlib.crc32(first), zlib.crc32(second), len(second))
    assert joined == zlib.crc32(first + second)


def layout_of(sizes: list[int]) -> FileLayout:
    """Slots with their sums right behind them, and all sums once more at the end."""
    slots, places, at = [], [], 0
    for number, size in enumerate(sizes):
        tensor = stored_tensor("model", str(number), Placed("U8", (size,), ()))
        slots.append(Slot(tensor, at, at + size))
        places.append(Checksum(at + size, number))
        at += size + 4
    places += [Checksum(at + 4 * number, number) for number in range(len(sizes))]
    return FileLayout(at + 4 * len(sizes), tuple(slots), (), tuple(places))


def expected_of(layout: FileLayout, data: bytes) -> bytes:
    found = bytearray(data)
    for place in layout.checksums:
        slot = layout.slots[place.slot]
        crc = zlib.crc32(data[slot.begin : slot.end])
        found[place.begin : place.begin + 4] = crc.to_bytes(4, "little")
    return bytes(found)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(0, 1 << 20),
)
def test_two_ranges_fill_in_every_sum_the_second_one_at_last(
    sizes: list[int], window: int, windows_of_first: int, order: int
) -> None:
    layout = layout_of(sizes)
    data = bytes(i * 37 % 251 for i in range(layout.nbytes))
    file, sums = bytearray(data), Checksums(layout)
    starts = list(range(0, layout.nbytes, window))
    lanes = [starts[:windows_of_first], starts[windows_of_first:]]
    waiting = []
    while any(lanes):
        lane = lanes[order % 2] or lanes[1 - order % 2]
        order = order // 2 or 1
        if not write(file, sums, data, start := lane.pop(0), window):
            waiting.append(start)
    for start in waiting:
        assert write(file, sums, data, start, window)
    assert bytes(file) == expected_of(layout, data)


def write(file: bytearray, sums: Checksums, data: bytes, start: int, window: int) -> bool:
    """One window, as an export writes it."""
    stop = min(start + window, len(data))
    buffer = memoryview(bytearray(data[start:stop]))
    sums.update(buffer, start, stop)
    complete = sums.put(buffer, start, stop)
    if complete:
        file[start:stop] = buffer
    return complete
