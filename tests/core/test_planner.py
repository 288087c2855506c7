"""Every element is written exactly once, by a rank that holds it, and all ranks share the work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.steps import steps_of
from tests.core.strategies import boxes_in, counts, held_boxes, layouts, shapes
from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.layout import Layout, Mesh, Table
from zero_ckpt.core.manifest import FileRecord, Manifest, shard_name
from zero_ckpt.core.planner import MIN_PIECE, Placed, SavePlan, needed_chunks, plan_save
from zero_ckpt.errors import StateMismatchError

RANKS = 8


def table_of(tensors: dict[str, Layout], role: str = "model") -> Table:
    table = Table()
    table.roles[role] = dict(tensors)
    return table


def plan_of(tensors: dict[str, Layout], ranks: int = RANKS) -> dict[str, Placed]:
    return plan_save([(table_of(tensors), range(ranks))]).roles["model"]


def written(plan: SavePlan, role: str = "model", ranks: int = RANKS) -> dict[str, list[Any]]:
    """key -> (rank, box) of all that the ranks write."""
    found: dict[str, list[Any]] = {key: [] for key in plan.roles[role]}
    for rank in range(ranks):
        for key, box in plan.chunks_of(rank, role):
            found[key].append((rank, box))
    return found


def big(layout: Layout) -> Layout:
    """The same tensor with dimensions so long that its pieces are worth cutting."""
    shape = tuple(n * 300_000 for n in layout.shape)
    return Layout("F32", shape, layout.mesh, layout.placements)


@given(st.lists(layouts(), min_size=1, max_size=6))
def test_every_element_is_written_once_by_a_rank_that_holds_it(tensors: list[Layout]) -> None:
    named = {f"t{i}": layout for i, layout in enumerate(tensors)}
    plan = plan_save([(table_of(named), range(RANKS))])
    for key, chunks in written(plan).items():
        layout = named[key]
        assert (counts(layout.shape, [box for _, box in chunks]) == 1).all()
        held = held_boxes(layout)
        for rank, box in chunks:
            assert box.intersect(held[rank]) == (box if box.numel else None)
        assert chunks, "a tensor without elements is written too"
        assert plan.roles["model"][key].placements == layout.placements


@given(layouts())
def test_large_tensors_are_cut_among_their_replicas(layout: Layout) -> None:
    layout = big(layout)
    assert layout.mesh is not None
    plan = plan_save([(table_of({"t": layout}), range(RANKS))])
    chunks = written(plan)["t"]
    held = held_boxes(layout)
    assert sum(box.numel for _, box in chunks) == full_box(layout.shape).numel
    assert all(box.intersect(held[rank]) == box for rank, box in chunks if box.numel)
    if layout.shape and full_box(layout.shape).numel:
        smallest = min(sum(h == b for h in held.values()) for b in held.values() if b.numel)
        share = max(b.numel for b in held.values()) / smallest
        load = {rank: sum(b.numel for r, b in chunks if r == rank) for rank in layout.mesh.ranks}
        assert max(load.values()) <= 2 * share + 300_000


@given(st.data(), layouts())
def test_a_wanted_box_needs_the_chunks_that_it_overlaps(
    data: st.DataObject, layout: Layout
) -> None:
    placed = plan_of({"t": layout})["t"]
    wanted = data.draw(boxes_in(layout.shape))
    parts = [box.intersect(wanted) for _, box in needed_chunks(placed, wanted)]
    found = counts(layout.shape, [part for part in parts if part is not None])
    assert np.array_equal(found, counts(layout.shape, [wanted]))


@given(shapes, st.lists(st.integers(0, RANKS - 1), min_size=1, unique=True))
def test_tensors_that_only_some_ranks_have_are_written_by_one_of_them(
    shape: tuple[int, ...], having: list[int]
) -> None:
    layout = Layout("F32", shape)
    ranks = sorted(having)
    others = [rank for rank in range(RANKS) if rank not in ranks]
    tables = [(table_of({"a": layout, "b": layout}), ranks)]
    if others:
        tables.append((table_of({"b": layout}), others))
    found = written(plan_save(tables))
    assert {rank for rank, _ in found["a"]} <= set(ranks)
    for key in ("a", "b"):
        assert (counts(shape, [box for _, box in found[key]]) == 1).all()


@given(st.lists(layouts(), min_size=1, max_size=4))
def test_the_plan_does_not_depend_on_who_makes_it(tensors: list[Layout]) -> None:
    """Ranks get the tables as bytes, and the tables of other ranks in any grouping of equal ones."""
    named = {f"t{i}": layout for i, layout in enumerate(tensors)}
    table = table_of(named)
    again = Table.from_bytes(table.to_bytes())
    assert again.digest() == table.digest()
    assert plan_save([(again, range(RANKS))]) == plan_save([(table, range(RANKS))])


def test_replicas_share_the_bytes() -> None:
    sizes = [(MIN_PIECE // 4, 1), (3, 5), (MIN_PIECE, 3), (1000,), (77, MIN_PIECE // 40)]
    tensors = {f"t{i}": Layout("F32", sizes[i % len(sizes)]) for i in range(60)}
    plan = plan_save([(table_of(tensors), range(4))])
    load = [sum(box.numel for _, box in plan.chunks_of(rank, "model")) for rank in range(4)]
    assert max(load) < 1.1 * min(load)


def test_what_may_differ_between_replicas_is_written_by_the_lowest_rank() -> None:
    layout = Layout("F32", (MIN_PIECE,), whole=True)
    assert plan_of({"buffer": layout})["buffer"].runs[0].ranks() == range(1)


def test_equal_shards_on_separate_meshes_are_replicas() -> None:
    """As in hybrid sharding with one mesh object for each shard group."""
    one, other = (Layout("F32", (6,), Mesh((2,), ranks), ("S0",)) for ranks in ((0, 2), (1, 3)))
    plan = plan_save([(table_of({"t": one}), (0, 2)), (table_of({"t": other}), (1, 3))])
    chunks = written(plan)["t"]
    assert (counts((6,), [box for _, box in chunks]) == 1).all()


F32, F64 = Layout("F32", (4,)), Layout("F64", (4,))
SPLIT = Layout("F32", (4,), Mesh((1,), (1,)), ("S0",))


@pytest.mark.parametrize("other", [F64, Layout("F32", (5,)), SPLIT], ids=["dtype", "shape", "way"])
def test_one_name_for_different_tensors_is_refused(other: Layout) -> None:
    with pytest.raises(StateMismatchError, match=r"tensor 'w'.*different"):
        plan_save([(table_of({"w": F32}), (0,)), (table_of({"w": other}), (1,))])


def model_tables(ranks: int, tensors: int) -> Table:
    """A transformer's shapes under hybrid sharding: replicate 4 x shard."""
    mesh = Mesh((4, ranks // 4), tuple(range(ranks)))
    kinds = [(50257, 1600), (1600,), (1600, 4800), (4800,), (1600, 1600), (6400, 1600), (1601,)]
    layout = [Layout("F32", shape, mesh, ("R", "S0")) for shape in kinds]
    return table_of({f"block.{i}.weight": layout[i % len(kinds)] for i in range(tensors)})


def manifest_of(plan: SavePlan, ranks: int) -> Manifest:
    names = [shard_name(role, r, ranks, 1) for role in ("model", "state") for r in range(ranks)]
    return Manifest(
        tag="t",
        step=1,
        world_size=ranks,
        zero_stage=3,
        files={name: FileRecord(1 << 40, "0" * 32) for name in names},
        tensors=plan.roles,
    )


def test_a_mesh_of_ranks_that_do_not_save_is_refused() -> None:
    sharded = Layout("F32", (8,), Mesh((2,), (0, 1)), ("S0",))
    with pytest.raises(StateMismatchError, match=r"ranks up to 1, but 1 ranks save"):
        plan_of({"t": sharded}, ranks=1)


def test_the_manifest_grows_with_tensors_plus_ranks() -> None:
    """Every tensor costs a line, every rank its files' lines, and no tensor anything for a rank."""

    def size(ranks: int, tensors: int) -> int:
        plan = plan_save([(model_tables(ranks, tensors), range(ranks))])
        return len(manifest_of(plan, ranks).to_bytes())

    for_tensors = size(16, 600) - size(16, 100)
    for_ranks = size(1024, 100) - size(16, 100)
    assert size(1024, 600) < size(16, 100) + for_tensors + for_ranks + 8192


def test_a_load_among_4096_ranks_is_planned_in_bounded_work() -> None:
    """6000 tensors, saved by 4096 ranks: one rank of 512 finds its chunks in a few lines of work for each."""
    table = model_tables(4096, 6000)
    manifest = manifest_of(plan_save([(table, range(4096))]), 4096)
    manifest = Manifest.from_bytes(manifest.to_bytes())
    tensors = list(manifest.tensors["model"].values())
    assert len(tensors) == 6000
    sample = tensors[::50]  # counting lines is slow
    found: list[tuple[int, Box]] = []

    def plan_load() -> None:
        for placed in sample:
            rows = -(-placed.shape[0] // 512)
            start = min(rows * 100, placed.shape[0])
            length = min(rows, placed.shape[0] - start)
            wanted = Box((start, *(0,) * (len(placed.shape) - 1)), (length, *placed.shape[1:]))
            found.extend(needed_chunks(placed, wanted))

    steps = steps_of(plan_load)
    assert len(sample) <= len(found) < len(sample) * 12
    assert steps < len(sample) * 12 * 40


def test_the_plan_of_a_save_costs_tensors_plus_ranks() -> None:
    """Among the tensors is a step for each, which all ranks hold."""

    def work(ranks: int, tensors: int) -> int:
        table, step = model_tables(ranks, tensors), Layout("F32", ())
        table.roles["optim"] = {f"{key}/step": step for key in table.roles["model"]}
        return steps_of(lambda: plan_save([(table, range(ranks))]))

    for_tensors = work(64, 400) - work(64, 100)
    assert work(4096, 400) - work(4096, 100) < 1.1 * for_tensors
    assert work(4096, 100) - work(64, 100) < 20 * 4096


def test_what_all_ranks_hold_and_is_tiny_lies_in_few_files() -> None:
    """Else a rank that loads thousands of optimizer steps would open thousands of files."""
    plan = plan_of({f"{i}/step": Layout("F32", ()) for i in range(1000)}, ranks=64)
    assert (
        len({rank for placed in plan.values() for run in placed.runs for rank in run.ranks()}) <= 2
    )
