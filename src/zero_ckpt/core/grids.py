"""Grids: the distinct boxes of a layout and who holds each, as runs. Pure arithmetic on mesh dimensions, not on ranks.

Mesh dimensions that split the tensor make the rows of a grid, one box each; those that replicate it make its columns:
the ranks of a row hold the same box. Everything is computed at positions of the mesh, where neighbours along one mesh
dimension are equally far apart, and put on ranks at the end: a mesh may list these in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod

from zero_ckpt.core.chunks import Box, split_evenly
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.layout import Layout, Mesh, local_box, split_order
from zero_ckpt.core.runs import Run, even_run

__all__ = ["Grid"]


class Grid:
    """The boxes of one layout (rows), and the ranks that hold each (columns).

    `mesh`, `columns`: where the replicas lie; a column is a position in the mesh. `row_bytes`: of the largest box.
    """

    def __init__(self, layout: Layout, holders: tuple[int, ...]) -> None:
        """`holders`: the ranks that have a tensor that lies on no mesh."""
        mesh = layout.mesh or Mesh((len(holders),), holders)
        placements = layout.placements if layout.mesh else ("R",)
        rows = list(_rows(layout.shape, mesh, placements))
        columns = _positions(mesh.shape, [placement == "R" for placement in placements])
        if not rows:  # Without elements it has no box: the lowest rank writes an empty one.
            mesh, columns = Mesh((1,), (min(mesh.ranks),)), [0]
            rows = [Run(0, (0,) * len(layout.shape), layout.shape)]
        self.mesh, self.columns, self._rows = mesh, tuple(columns), rows
        self.row_bytes = max(prod(row.shape) for row in rows) * itemsize(layout.dtype)

    def runs(self, first: int, pieces: int) -> tuple[Run, ...]:
        """The chunks when each box is cut into `pieces`, for as many columns from `first` on, going round."""
        width = len(self.columns)
        columns = [self.columns[(first + i) % width] for i in range(pieces)]
        if len(self._rows) == 1 and self._rows[0].count == 1:
            return tuple(self._across(columns))
        return tuple(
            run
            for index, column in enumerate(columns)
            for row in self._rows
            for run in self._along(row, column, pieces, index)
        )

    def _across(self, columns: Sequence[int]) -> Iterator[Run]:
        """The pieces of the only box follow each other from column to column."""
        (row,) = self._rows
        box = Box(row.offset, row.shape)
        run = even_run(box, _cut_dim(box.shape, len(columns)), len(columns))
        yield from _on_ranks(run, [self.mesh.ranks[row.rank + column] for column in columns])

    def _along(self, row: Run, column: int, pieces: int, index: int) -> Iterator[Run]:
        """Piece `index` of every box of a row, on the ranks of one column."""
        first = row.rank + column
        ranks = self.mesh.ranks[first : first + row.count * row.stride : row.stride]
        for run in _cut(row, pieces, index):
            yield from _on_ranks(run, ranks[: run.count])
            ranks = ranks[run.count :]


def _positions(mesh_shape: Sequence[int], free: Sequence[bool]) -> list[int]:
    """Positions in a mesh, ascending, of all coordinates that are 0 where the dimension is not `free`."""
    found = [0]
    for extent, is_free, stride in zip(mesh_shape, free, _strides(mesh_shape), strict=True):
        found = [at + i * stride for at in found for i in range(extent if is_free else 1)]
    return found


def _strides(mesh_shape: Sequence[int]) -> list[int]:
    return [prod(mesh_shape[i + 1 :]) for i in range(len(mesh_shape))]


def _rows(shape: tuple[int, ...], mesh: Mesh, placements: tuple[str, ...]) -> Iterator[Run]:
    """The boxes that have elements, with positions in place of ranks.

    Each run goes along the longest mesh dimension that no other one cuts further.
    """
    last = {placements[i][1:]: i for i in split_order(placements)}
    if not last:
        if prod(shape):
            yield Run(0, (0,) * len(shape), shape)
        return
    axis = max(last.values(), key=lambda i: mesh.shape[i])
    others = tuple(1 if i == axis else n for i, n in enumerate(mesh.shape))
    strides = _strides(mesh.shape)
    ranges = [range(1 if p == "R" else n) for p, n in zip(placements, others, strict=True)]
    for coordinate in product(*ranges):
        box = local_box(shape, others, placements, coordinate)
        if box.numel:
            position = sum(i * stride for i, stride in zip(coordinate, strides, strict=True))
            run = even_run(box, int(placements[axis][1:]), mesh.shape[axis])
            yield replace(run, rank=position, stride=strides[axis])


def _cut_dim(shape: Sequence[int], parts: int) -> int:
    """The first dimension that is long enough for `parts` pieces, else the longest one."""
    return next(
        (d for d, n in enumerate(shape) if n >= parts),
        max(range(len(shape)), key=lambda d: shape[d], default=0),
    )


def _cut(row: Run, parts: int, index: int) -> Iterator[Run]:
    """Piece `index` of each box of a row; the last box, when it is shorter, may be cut in another way."""
    if parts == 1:
        yield row
        return
    ends = row.chunk(0)[1], row.chunk(row.count - 1)[1]
    dim, last_dim = (_cut_dim(box.shape, parts) for box in ends)
    if ends[0].shape == ends[1].shape or dim == last_dim != row.dim:
        yield _pieces(row, dim, parts, index)
        return
    yield _pieces(row.part(0, row.count - 1), dim, parts, index)
    yield _pieces(row.part(row.count - 1, 1), last_dim, parts, index)


def _pieces(row: Run, dim: int, parts: int, index: int) -> Run:
    """Piece `index` of boxes that are all cut alike along `dim`."""
    start, length = split_evenly(row.shape[dim], parts, index)
    offset = (*row.offset[:dim], row.offset[dim] + start, *row.offset[dim + 1 :])
    shape = (*row.shape[:dim], length, *row.shape[dim + 1 :])
    last = length if row.count > 1 and dim == row.dim else row.last
    return replace(row, offset=offset, shape=shape, last=last)


def _on_ranks(run: Run, ranks: Sequence[int]) -> Iterator[Run]:
    """`run` with chunk `i` on `ranks[i]`: as many runs as there are rows of equally distant, rising ranks."""
    if not prod(run.shape) and run.offset != (0,) * len(run.shape):
        return
    begin = 0
    while begin < run.count:
        end = begin + _rising(ranks[begin : run.count])
        stride = ranks[begin + 1] - ranks[begin] if end > begin + 1 else 1
        yield replace(run.part(begin, end - begin), rank=ranks[begin], stride=stride)
        begin = end


def _rising(ranks: Sequence[int]) -> int:
    """How many of `ranks`, from the first on, rise in equal steps."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 0
    if step < 1:
        return 1
    if list(ranks) == list(range(ranks[0], ranks[0] + step * len(ranks), step)):
        return len(ranks)
    return next(i for i in range(1, len(ranks)) if ranks[i] - ranks[i - 1] != step)
