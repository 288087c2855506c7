"""Who writes which chunk, and which chunks a wanted box needs. Pure arithmetic: no tensors, files or messages.

Every rank computes the same plan from the same tables, so nothing about single chunks is ever exchanged. A tensor
that several ranks hold is written once: large ones are cut into pieces along one dimension, small ones go to the rank
with the least to write.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from zero_ckpt.core.chunks import Box, full_box, split_evenly
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.layout import ROLES, Layout, Mesh, Table, local_box
from zero_ckpt.core.runs import Run, encode_runs
from zero_ckpt.errors import StateMismatchError

__all__ = ["MIN_PIECE", "Placed", "SavePlan", "needed_chunks", "plan_save"]

MIN_PIECE = 1 << 20
"""Bytes. Replicated tensors are not cut into smaller pieces than this."""

Chunks = tuple[tuple[int, Box], ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in a checkpoint: what it is, and on which ranks' files its chunks are.

    `placements` are those of the live DTensor when it was saved, or None for a plain tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    placements: tuple[str, ...] | None = None


@dataclass(slots=True)
class SavePlan:
    """role -> key -> where it goes. Equal tensors share one `Placed`."""

    roles: dict[str, dict[str, Placed]] = field(
        default_factory=lambda: {role: {} for role in ROLES}
    )

    def chunks_of(self, rank: int, role: str) -> Iterator[tuple[str, Box]]:
        """(key, box) of what `rank` writes into its file of `role`."""
        seen: dict[int, list[Box]] = {}
        for key, placed in self.roles[role].items():
            boxes = seen.get(id(placed))
            if boxes is None:
                boxes = [box for run in placed.runs for owner, box in run if owner == rank]
                seen[id(placed)] = boxes
            for box in boxes:
                yield key, box


def plan_save(tables: Sequence[tuple[Table, Sequence[int]]]) -> SavePlan:
    """The plan for a job whose distinct tables are each held by the given ranks (ascending).

    Raises `StateMismatchError` when two ranks describe one key differently.
    """
    return _Planner(tables).plan()


class _Planner:
    """State of one planning: bytes given to each rank so far, and what was computed for equal layouts."""

    def __init__(self, tables: Sequence[tuple[Table, Sequence[int]]]) -> None:
        self._tables = tables
        self._load: dict[int, int] = {rank: 0 for _, ranks in tables for rank in ranks}
        self._grids: dict[tuple[Layout, tuple[int, ...]], _Grid] = {}
        self._placed: dict[tuple[int, tuple[int, ...]], Placed] = {}
        self._holders: dict[tuple[int, ...], tuple[int, ...]] = {}

    def plan(self) -> SavePlan:
        plan = SavePlan()
        for role in ROLES:
            for key, having in self._keys(role).items():
                layouts = tuple(self._tables[i][0].roles[role][key] for i in having)
                plan.roles[role][key] = self._place(key, layouts, self._ranks(having))
        return plan

    def _keys(self, role: str) -> dict[str, tuple[int, ...]]:
        """key -> indices of the tables that have it; keys in the order in which the tables list them."""
        if len(self._tables) == 1:
            return dict.fromkeys(self._tables[0][0].roles[role], (0,))
        having: dict[str, tuple[int, ...]] = {}
        for index, (table, _) in enumerate(self._tables):
            for key in table.roles[role]:
                having[key] = (*having.get(key, ()), index)
        return having

    def _ranks(self, having: tuple[int, ...]) -> tuple[int, ...]:
        if having not in self._holders:
            self._holders[having] = tuple(sorted(r for i in having for r in self._tables[i][1]))
        return self._holders[having]

    def _place(self, key: str, layouts: tuple[Layout, ...], holders: tuple[int, ...]) -> Placed:
        layout = layouts[0]
        if len(layouts) > 1 and any(item != layout for item in layouts):
            layout = _stacked(key, layouts)
        grid = self._grids.get((layout, holders))
        if grid is None:
            grid = self._grids[layout, holders] = _Grid(layout, holders)
        columns = grid.choose(self._load)
        cached = self._placed.get((id(grid), columns))
        if cached is None:
            chunks = grid.chunks(columns)
            placements = layout.placements if layout.mesh else None
            cached = Placed(layout.dtype, layout.shape, encode_runs(chunks), placements)
            self._placed[id(grid), columns] = cached
        return cached


class _Grid:
    """The distinct boxes of a layout (rows), and for each the ranks that hold a replica of it (columns)."""

    def __init__(self, layout: Layout, holders: tuple[int, ...]) -> None:
        self.layout = layout
        mesh = layout.mesh or Mesh((len(holders),), holders)
        placements = layout.placements if layout.mesh else ("R",)
        by_box: dict[Box, list[int]] = {}
        for rank, coordinate in mesh.coordinates():
            box = local_box(layout.shape, mesh.shape, placements, coordinate)
            by_box.setdefault(box, []).append(rank)
        self.rows = [(box, ranks) for box, ranks in by_box.items() if box.numel]
        if not self.rows:
            self.rows = [(full_box(layout.shape), [min(mesh.ranks)])]
        self.width = min(len(ranks) for _, ranks in self.rows)
        self._row_bytes = max(box.numel for box, _ in self.rows) * itemsize(layout.dtype)

    def choose(self, load: dict[int, int]) -> tuple[int, ...]:
        """The columns that write, and note in `load` the bytes that it gives to them."""
        if self.width == 1:
            return (0,)
        pieces = min(self.width, self._row_bytes // MIN_PIECE)
        if self.layout.whole:
            columns: tuple[int, ...] = (0,)
        elif pieces >= self.width:
            columns = tuple(range(self.width))
        else:
            ranks = self.rows[0][1]
            least = heapq.nsmallest(
                max(1, pieces), range(self.width), key=lambda c: (load[ranks[c]], c)
            )
            columns = tuple(sorted(least))
        share = self._row_bytes // len(columns)
        for _, ranks in self.rows:
            for column in columns:
                load[ranks[column]] += share
        return columns

    def chunks(self, columns: tuple[int, ...]) -> Chunks:
        """(rank, box) of every chunk, column by column, so that each column's rows form runs."""
        found = []
        for index, column in enumerate(columns):
            for box, ranks in self.rows:
                piece = _piece(box, len(columns), index)
                if piece.numel or not box.numel:
                    found.append((ranks[column], piece))
        if len(self.rows) == 1:
            found.sort(key=lambda item: item[1].offset)
        return tuple(found)


def _piece(box: Box, parts: int, index: int) -> Box:
    """Piece `index` of `box` cut into `parts` along its first dimension that is long enough."""
    if parts == 1:
        return box
    dim = next(
        (d for d, n in enumerate(box.shape) if n >= parts),
        max(range(len(box.shape)), key=lambda d: box.shape[d]),
    )
    start, length = split_evenly(box.shape[dim], parts, index)
    offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
    return Box(offset, (*box.shape[:dim], length, *box.shape[dim + 1 :]))


def _stacked(key: str, layouts: tuple[Layout, ...]) -> Layout:
    """Layouts of one tensor on several meshes of equal shape, as replicas on one mesh of one more dimension."""
    distinct = list(dict.fromkeys(layouts))
    first = distinct[0]
    kinds = sorted({f"{item.dtype} {list(item.shape)}" for item in distinct})
    if len(kinds) > 1:
        raise StateMismatchError(
            f"tensor '{key}' is {' on one rank and '.join(kinds)} on another: make it a DTensor, or give the "
            "parts different names"
        )
    meshes = [item.mesh for item in distinct if item.mesh is not None]
    alike = {(item.mesh and item.mesh.shape, item.placements) for item in distinct}
    if len(alike) > 1 or len(meshes) < len(distinct):
        ways = sorted({" ".join(item.placements) or "plain" for item in distinct})
        raise StateMismatchError(
            f"tensor '{key}' is laid out in different ways on different ranks ({', '.join(ways)}): "
            "use one mesh shape and one placement, or different names"
        )
    ranks = tuple(rank for mesh in meshes for rank in mesh.ranks)
    mesh = Mesh((len(meshes), *meshes[0].shape), ranks)
    return Layout(first.dtype, first.shape, mesh, ("R", *first.placements), first.whole)


def needed_chunks(placed: Placed, wanted: Box) -> Iterator[tuple[int, Box]]:
    """(rank, box) of the stored chunks that share elements with `wanted`."""
    for run in placed.runs:
        yield from run.overlapping(wanted)
