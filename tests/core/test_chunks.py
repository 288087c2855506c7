"""Boxes: intersection, flat ranges and coverage, each against counting single elements."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.strategies import boxes_in, counts, filled_shapes, shapes, tilings
from zero_ckpt.core.chunks import Box, coverage_error, flat_range_boxes, full_box, split_evenly


def grid(shape: tuple[int, ...]) -> np.ndarray:
    """Every element holds its own row-major position."""
    return np.arange(int(np.prod(shape)), dtype=int).reshape(shape)


@given(st.data(), filled_shapes)
def test_a_flat_range_is_cut_into_boxes_in_order(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    numel = int(np.prod(shape))
    start, stop = sorted((data.draw(st.integers(0, numel)), data.draw(st.integers(0, numel))))
    boxes = flat_range_boxes(shape, start, stop)
    elements = [grid(shape)[box.slices()].ravel() for box in boxes]
    assert np.concatenate([*elements, []]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.data(), shapes)
def test_intersection_holds_the_common_elements(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    one, other = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    both = counts(shape, [one]) * counts(shape, [other])
    common = one.intersect(other)
    assert np.array_equal(both, counts(shape, [common] if common else []))
    if common:
        assert common.relative_to(one).shifted(one.offset) == common
        inside = grid(shape)[one.slices()][common.relative_to(one).slices()]
        assert np.array_equal(inside, grid(shape)[common.slices()])


@given(st.data(), shapes)
def test_a_tiling_covers(data: st.DataObject, shape: tuple[int, ...]) -> None:
    assert coverage_error(shape, data.draw(tilings(shape))) is None


@given(st.data(), filled_shapes)
def test_any_hole_or_overlap_is_found(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(tilings(shape)) if data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(0, 2))):
        if boxes and data.draw(st.booleans()):
            boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        else:
            boxes.append(data.draw(boxes_in(shape)))
    exact = bool((counts(shape, boxes) == 1).all())
    assert (coverage_error(shape, boxes) is None) == exact


def test_a_box_outside_of_the_tensor_is_found() -> None:
    assert "outside" in str(coverage_error((4,), [Box((0,), (4,)), Box((4,), (1,))]))


@pytest.mark.parametrize("length", [0, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_even_splits_are_those_of_torch(length: int, parts: int) -> None:
    pieces = [split_evenly(length, parts, index) for index in range(parts)]
    expected = [len(part) for part in torch.arange(length).chunk(parts)] if length else []
    assert [n for _, n in pieces] == expected + [0] * (parts - len(expected))
    assert all(a + n == b for (a, n), (b, _) in pairwise(pieces))


def test_a_scalar_has_one_element() -> None:
    assert full_box(()).numel == 1
    assert flat_range_boxes((), 0, 1) == [Box((), ())]
    assert coverage_error((), []) is not None
    assert coverage_error((), [full_box(()), full_box(())]) == "two chunks overlap"
