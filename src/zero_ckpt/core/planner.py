"""Who writes which chunk, and which chunks a wanted box needs. Pure arithmetic: no tensors, files or messages.

Every rank computes the same plan from the same tables, so nothing about single chunks is ever exchanged. A tensor
that several ranks hold is written once: large ones are cut into pieces along one dimension, and go to those with the
least to write; tiny ones stay on few ranks, so that a rank that reads all of them opens few files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from math import prod

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.grids import Grid
from zero_ckpt.core.layout import ROLES, Layout, Mesh, Table
from zero_ckpt.core.runs import Run
from zero_ckpt.errors import StateMismatchError

__all__ = ["MIN_PIECE", "Placed", "SavePlan", "needed_chunks", "plan_save"]

MIN_PIECE = 1 << 20
"""Bytes. Replicated tensors are not cut into smaller pieces than this."""

_TINY, _FEW = 1024, 2
"""Tensors of at most so many bytes, such as an optimizer's `step` for every parameter, go to so many ranks."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in a checkpoint: what it is, and on which ranks' files its chunks are.

    `placements` are those of the live DTensor when it was saved, or None for a plain tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    placements: tuple[str, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return prod(self.shape) * itemsize(self.dtype)


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
                found = (run.on(rank) for run in placed.runs)
                boxes = seen[id(placed)] = [box for box in found if box is not None]
            for box in boxes:
                yield key, box


def plan_save(tables: Sequence[tuple[Table, Sequence[int]]]) -> SavePlan:
    """The plan for a job whose distinct tables are each held by the given ranks (ascending), each rank in one of them.

    Raises `StateMismatchError` when two ranks describe one key differently, or a mesh has ranks that hold no table.
    """
    return _Planner(tables).plan()


class _Planner:
    """One plan while it is made: bytes given to columns so far, and what was computed for equal layouts."""

    def __init__(self, tables: Sequence[tuple[Table, Sequence[int]]]) -> None:
        self._tables = tables
        self._world_size = sum(len(ranks) for _, ranks in tables)
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], _Held] = {}
        self._columns: dict[tuple[Mesh, tuple[int, ...]], _Columns] = {}
        self._placed: dict[tuple[int, int, int], Placed] = {}

    def plan(self) -> SavePlan:
        plan = SavePlan()
        for role in ROLES:
            for key, having in self._keys(role).items():
                layouts = tuple(self._tables[i][0].roles[role][key] for i in having)
                plan.roles[role][key] = self._place(key, layouts, having)
        return plan

    def _keys(self, role: str) -> dict[str, tuple[int, ...]]:
        """key -> indices of the tables that have it; keys in the order in which the tables list them."""
        if len(self._tables) == 1:
            return dict.fromkeys(self._tables[0][0].roles[role], (0,))
        having: dict[str, list[int]] = {}
        for index, (table, _) in enumerate(self._tables):
            for key in table.roles[role]:
                having.setdefault(key, []).append(index)
        return {key: tuple(indices) for key, indices in having.items()}

    def _place(self, key: str, layouts: tuple[Layout, ...], having: tuple[int, ...]) -> Placed:
        known = tuple(map(id, layouts)), having  # a layout is as long as its mesh: no hashing
        held = self._known.get(known)
        if held is None:
            held = self._known[known] = self._hold(key, layouts, having)
        first, pieces = self._choose(held)
        placed = self._placed.get((id(held), first, pieces))
        if placed is None:
            layout = held.layout
            placements = layout.placements if layout.mesh else None
            placed = Placed(layout.dtype, layout.shape, held.grid.runs(first, pieces), placements)
            self._placed[id(held), first, pieces] = placed
        return placed

    def _hold(self, key: str, layouts: tuple[Layout, ...], having: tuple[int, ...]) -> _Held:
        layout = layouts[0]
        if len(layouts) > 1 and any(item != layout for item in layouts):
            layout = _stacked(key, layouts)
        if layout.mesh is not None and _highest(layout.mesh) >= self._world_size:
            raise StateMismatchError(
                f"tensor '{key}' is sharded over ranks up to {_highest(layout.mesh)}, but {self._world_size} ranks "
                "save: its process group is gone, or is not the one that saves. Nothing was committed. Save before "
                "the process group is destroyed."
            )
        holders = sorted(chain.from_iterable(self._tables[i][1] for i in having))
        grid = Grid(layout, tuple(holders))
        columns = self._columns.setdefault(
            (grid.mesh, grid.columns), _Columns([0] * len(grid.columns))
        )
        return _Held(layout, grid, columns)

    def _choose(self, held: _Held) -> tuple[int, int]:
        """(first column, number of columns): each of these columns writes one piece of every box."""
        width, nbytes = len(held.grid.columns), held.grid.row_bytes
        pieces = max(1, min(width, nbytes // MIN_PIECE))
        if held.layout.whole:
            held.columns.give(0, 1, nbytes)
            return 0, 1
        if pieces == width:
            return 0, width
        first = held.columns.least(_FEW if nbytes <= _TINY else width)
        held.columns.give(first, pieces, nbytes)
        return first, pieces


@dataclass(frozen=True, slots=True)
class _Held:
    """A layout and the ranks that hold it. Layouts whose replicas lie on the same ranks share their `columns`."""

    layout: Layout
    grid: Grid
    columns: _Columns


@dataclass(slots=True)
class _Columns:
    """Bytes given to each column."""

    given: list[int]

    def least(self, among: int) -> int:
        """The first of the first `among` columns that were given the least."""
        candidates = self.given[:among]
        return candidates.index(min(candidates))

    def give(self, first: int, pieces: int, nbytes: int) -> None:
        """Add an equal share to `pieces` columns from `first` on, going round."""
        for i in range(pieces):
            self.given[(first + i) % len(self.given)] += nbytes // pieces


def _stacked(key: str, layouts: tuple[Layout, ...]) -> Layout:
    """Layouts of one tensor on several meshes of equal shape, as replicas on one mesh of one more dimension."""
    distinct = list(dict.fromkeys(layouts))
    first = distinct[0]
    kinds = sorted({f"{item.dtype} {list(item.shape)}" for item in distinct})
    if len(kinds) > 1:
        raise StateMismatchError(
            f"tensor '{key}' is {' on one rank and '.join(kinds)} on another: make it a DTensor, or give the "
            "parts different names. Nothing was committed; earlier checkpoints are intact."
        )
    meshes = [item.mesh for item in distinct if item.mesh is not None]
    alike = {(item.mesh and item.mesh.shape, item.placements) for item in distinct}
    if len(alike) > 1 or len(meshes) < len(distinct):
        ways = sorted({" ".join(item.placements) or "plain" for item in distinct})
        raise StateMismatchError(
            f"tensor '{key}' is laid out in different ways on different ranks ({', '.join(ways)}): "
            "use one mesh shape and one placement, or different names. Nothing was committed; earlier checkpoints are "
            "intact."
        )
    ranks = tuple(rank for mesh in meshes for rank in mesh.ranks)
    mesh = Mesh((len(meshes), *meshes[0].shape), ranks)
    return Layout(first.dtype, first.shape, mesh, ("R", *first.placements), first.whole)


@lru_cache(maxsize=1024)
def _highest(mesh: Mesh) -> int:
    return max(mesh.ranks)


def needed_chunks(placed: Placed, wanted: Box) -> Iterator[tuple[int, Box]]:
    """(rank, box) of the stored chunks that share elements with `wanted`."""
    for run in placed.runs:
        yield from run.overlapping(wanted)
