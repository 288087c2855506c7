"""Runs say the same as the chunks that they stand for, in a size that does not grow with ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.steps import steps_of
from tests.core.strategies import boxes_in, counts, layouts, shapes, tilings
from zero_ckpt.core.chunks import Box, coverage_error, split_evenly
from zero_ckpt.core.layout import Layout
from zero_ckpt.core.planner import plan_save
from zero_ckpt.core.runs import Run, encode_runs, run_from_json, runs_coverage_error

RANKS = 8
Chunks = list[tuple[int, Box]]


@st.composite
def chunk_lists(draw: st.DrawFn, shape: tuple[int, ...]) -> Chunks:
    """Any chunks, and often rows of equal ones, so that runs form."""
    found = [(draw(st.integers(0, RANKS - 1)), box) for box in draw(tilings(shape)) if box.numel]
    if shape and draw(st.booleans()):
        dim, parts = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, RANKS))
        for index in range(parts):
            start, length = split_evenly(shape[dim], parts, index)
            extent = (*shape[:dim], length, *shape[dim + 1 :])
            if length:
                offset = tuple(start if d == dim else 0 for d in range(len(shape)))
                found.append((index, Box(offset, extent)))
    return found


def expanded(runs: tuple[Run, ...]) -> Chunks:
    return [chunk for run in runs for chunk in run]


@given(st.data(), shapes)
def test_encoding_loses_nothing(data: st.DataObject, shape: tuple[int, ...]) -> None:
    chunks = data.draw(chunk_lists(shape))
    runs = encode_runs(chunks)
    assert expanded(runs) == chunks
    assert [owner for run in runs for owner in run.ranks()] == [rank for rank, _ in chunks]
    again = [run_from_json(json.loads(json.dumps(r.to_json())), shape, RANKS) for r in runs]
    assert tuple(again) == runs


@given(st.data(), shapes)
def test_overlapping_finds_the_chunks_that_share_an_element(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    chunks = data.draw(chunk_lists(shape))
    wanted = data.draw(boxes_in(shape))
    expected = [(rank, box) for rank, box in chunks if box.intersect(wanted) is not None]
    assert [c for run in encode_runs(chunks) for c in run.overlapping(wanted)] == expected


@given(st.data(), shapes)
def test_coverage_of_runs_is_that_of_their_chunks(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    chunks = data.draw(chunk_lists(shape))
    direct = coverage_error(shape, [box for _, box in chunks])
    assert runs_coverage_error(shape, encode_runs(chunks)) == direct


@given(layouts())
def test_merged_boxes_hold_the_same_elements(layout: Layout) -> None:
    assert layout.mesh is not None
    (placed,) = plan_of(layout)
    for run in placed:
        chunks = [box for _, box in run]
        assert (counts(layout.shape, run.merged()) == counts(layout.shape, chunks)).all()


def plan_of(layout: Layout) -> list[tuple[Run, ...]]:
    from zero_ckpt.core.layout import Table

    table = Table()
    table.roles["model"]["w"] = layout
    return [plan_save([(table, range(RANKS))]).roles["model"]["w"].runs]


@pytest.mark.parametrize("rows", [4096, 4095 * 3 + 1, 100_000])
def test_an_even_split_over_many_ranks_is_one_run(rows: int) -> None:
    parts = [(rank, split_evenly(rows, 4096, rank)) for rank in range(4096)]
    runs = encode_runs((rank, Box((a, 0), (n, 7))) for rank, (a, n) in parts if n)
    assert len(runs) == 1
    assert runs[0].merged() == [Box((0, 0), (rows, 7))]
    assert runs_coverage_error((rows, 7), runs) is None


def test_overlapping_of_a_long_run_looks_at_the_wanted_chunks_only() -> None:
    run = Run(0, (0,), (10,), count=10**9, stride=1, dim=0, step=10, last=10)
    found = list(run.overlapping(Box((5_000_000_005,), (10,))))
    assert found == [
        (500_000_000, Box((5_000_000_000,), (10,))),
        (500_000_001, Box((5_000_000_010,), (10,))),
    ]


GOOD = Run(1, (0, 2), (2, 3), count=3, stride=2, dim=0, step=2, last=1)
LIES: list[dict[str, Any]] = [
    {"rank": -1},
    {"rank": 4},
    {"rank": True},
    {"rank": "1"},
    {"offset": [0]},
    {"offset": [0, -1]},
    {"offset": [0, 3]},
    {"offset": "02"},
    {"shape": [2, 3, 1]},
    {"shape": [2, 10**30]},
    {"shape": [0, 3]},
    {"shape": [2, 3.0]},
    {"count": 0},
    {"count": 4},
    {"count": 10**18},
    {"stride": 0},
    {"stride": 10**18},
    {"dim": 2},
    {"dim": 1},
    {"step": 0},
    {"step": 1},
    {"step": 3},
    {"last": 0},
    {"last": 3},
    {"extra": 1},
]


def test_the_true_run_is_accepted() -> None:
    assert run_from_json(GOOD.to_json(), (5, 5), 6) == GOOD


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_run_that_lies_is_refused(lie: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"run|natural"):
        run_from_json(GOOD.to_json() | lie, (5, 5), 6)


@pytest.mark.parametrize("record", [None, [], 7, {}, {"offset": [], "shape": []}])
def test_what_is_no_run_is_refused(record: Any) -> None:
    with pytest.raises(ValueError, match=r"run|natural"):
        run_from_json(record, (), 6)


@given(st.data(), shapes)
def test_a_run_knows_what_is_on_a_rank_and_gives_parts_of_itself(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    for run in encode_runs(data.draw(chunk_lists(shape))):
        chunks = list(run)
        assert [(rank, run.on(rank)) for rank in range(RANKS) if run.on(rank)] == chunks
        first = data.draw(st.integers(0, run.count - 1))
        count = data.draw(st.integers(1, run.count - first))
        assert list(run.part(first, count)) == chunks[first : first + count]


def comb(ranks: int) -> list[Run]:
    """`ranks` x 3 chunks of 2 rows each: three runs whose chunks interleave."""
    return [Run(i * ranks, (2 * i,), (2,), ranks, 1, 0, 6, 2) for i in range(3)]


def test_interleaved_runs_are_covered_together() -> None:
    assert runs_coverage_error((6 * 512,), comb(512)) is None
    assert "in no chunk" in str(runs_coverage_error((6 * 512,), comb(512)[:2]))
    doubled = [*comb(512)[:2], comb(512)[1]]
    assert runs_coverage_error((6 * 512,), doubled) == "two chunks overlap"
    assert steps_of(lambda: runs_coverage_error((6 * 4096,), comb(4096))) < 1000
