"""Boxes: where a chunk lies in its global tensor. Pure arithmetic; no tensors, no files.

A box is an n-dimensional, axis-aligned range of a global tensor, given by its offset and shape in elements.
A 0-d tensor has one box, with empty offset and shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

__all__ = ["Box", "coverage_error", "flat_range_boxes", "full_box", "split_evenly"]


class Box(NamedTuple):
    """`offset[d] .. offset[d] + shape[d]` in every dimension `d`, in elements."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None when the boxes share no element."""
        offset, shape = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            start, stop = max(a, b), min(a + n, b + m)
            if stop <= start:
                return None
            offset.append(start)
            shape.append(stop - start)
        return Box(tuple(offset), tuple(shape))

    def relative_to(self, outer: Box) -> Box:
        """The same box, with its offset counted from that of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)

    def shifted(self, origin: Sequence[int]) -> Box:
        """The same shape, moved by `origin`."""
        return Box(tuple(a + b for a, b in zip(self.offset, origin, strict=True)), self.shape)

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.offset, self.shape, strict=True))


def full_box(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def split_evenly(length: int, parts: int, index: int) -> tuple[int, int]:
    """(start, length) of piece `index` when `length` is cut into `parts` pieces of ceil(length / parts).

    The rule of `torch.chunk`, and so of DTensor's `Shard`: trailing pieces may be short or empty.
    """
    size = -(-length // parts) if length else 0
    start = min(size * index, length)
    return start, min(size, length - start)


def flat_range_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements `start .. stop` of a row-major tensor of `shape`, as at most 2 * ndim - 1 boxes in order."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        inner = flat_range_boxes(shape[1:], start - first * row, stop - first * row)
        return [_in_rows(box, first, 1) for box in inner]
    boxes: list[Box] = []
    if start % row:
        boxes += [
            _in_rows(b, first, 1) for b in flat_range_boxes(shape[1:], start - first * row, row)
        ]
        first += 1
    whole = stop // row
    if whole > first:
        boxes.append(_in_rows(full_box(shape[1:]), first, whole - first))
    if stop % row:
        boxes += [_in_rows(b, whole, 1) for b in flat_range_boxes(shape[1:], 0, stop - whole * row)]
    return boxes


def _in_rows(box: Box, row: int, rows: int) -> Box:
    return Box((row, *box.offset), (rows, *box.shape))


def coverage_error(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """None when the boxes tile a tensor of `shape` exactly; else a sentence about the hole or overlap."""
    live = [box for box in boxes if box.numel]
    if any(a + n > s for b in live for a, n, s in zip(b.offset, b.shape, shape, strict=True)):
        return f"a chunk reaches outside of shape {list(shape)}"
    if prod(shape) == 0:
        return None
    missing = prod(shape) - sum(box.numel for box in live)
    if missing > 0:
        return f"{missing} of {prod(shape)} elements are in no chunk"
    if missing < 0 or _overlap(live):
        return "two chunks overlap"
    return None


def _overlap(boxes: list[Box]) -> bool:
    """Whether any two boxes share an element: a plane sweep along the dimension that separates most."""
    if len(boxes) < 2:
        return False
    ndim = len(boxes[0].offset)
    if ndim == 0:
        return True
    dim = max(range(ndim), key=lambda d: len({box.offset[d] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offset[dim]):
        active = [a for a in active if a.offset[dim] + a.shape[dim] > box.offset[dim]]
        if any(a.intersect(box) is not None for a in active):
            return True
        active.append(box)
    return False
