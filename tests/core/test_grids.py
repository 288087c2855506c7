"""Chunks of any layout, cut among any replicas, in an effort that does not grow with the number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.steps import steps_of
from tests.core.strategies import counts, held_boxes, layouts
from zero_ckpt.core.chunks import full_box
from zero_ckpt.core.grids import Grid
from zero_ckpt.core.layout import Layout, Mesh


@given(st.data(), layouts())
def test_any_columns_write_every_element_once(data: st.DataObject, layout: Layout) -> None:
    grid = Grid(layout, ())
    width = len(grid.columns)
    first = data.draw(st.integers(0, width - 1))
    pieces = data.draw(st.integers(1, width if layout.shape else 1))  # no dimension, no cut
    chunks = [chunk for run in grid.runs(first, pieces) for chunk in run]
    assert (counts(layout.shape, [box for _, box in chunks]) == 1).all()
    held = held_boxes(layout)
    assert all(box.intersect(held[rank]) == box for rank, box in chunks if box.numel)


def test_columns_go_round() -> None:
    grid = Grid(Layout("F32", (9,)), (2, 5, 7))
    assert [rank for run in grid.runs(2, 2) for rank, _ in run] == [7, 2]


def test_a_tensor_without_elements_is_written_by_the_lowest_rank() -> None:
    layout = Layout("F32", (0, 3), Mesh((2,), (7, 4)), ("S0",))
    (run,) = Grid(layout, ()).runs(0, 1)
    assert list(run) == [(4, full_box((0, 3)))]


@pytest.mark.parametrize("placements", [("R", "S0", "S1"), ("R", "T0", "S0"), ("R", "S0", "R")])
def test_thousands_of_ranks_take_no_more_than_a_few(placements: tuple[str, ...]) -> None:
    def work(shards: int) -> int:
        shape = (8, shards, 8)
        mesh = Mesh(shape, tuple(range(64 * shards)))
        layout = Layout("F32", (128_256, 16_384), mesh, placements)
        return steps_of(lambda: Grid(layout, ()).runs(0, 1))

    assert work(64) < 2 * work(8)
