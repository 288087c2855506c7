"""Runs: where a tensor's chunks are, in a size that does not grow with the number of ranks. Pure.

A run is a row of equal boxes on ranks of equal distance: chunk `i` of `count` lies on rank `rank + i * stride`, is
shifted by `i * step` along dimension `dim`, and the last one may be shorter (`last` elements along `dim`). An even
split of one dimension over consecutive ranks, however many, is one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zero_ckpt.core.chunks import Box, coverage_error

__all__ = ["Run", "encode_runs", "even_run", "run_from_json", "runs_coverage_error"]


@dataclass(frozen=True, slots=True)
class Run:
    """`count` chunks; the first is the box (`offset`, `shape`) on `rank`."""

    rank: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    count: int = 1
    stride: int = 1
    dim: int = 0
    step: int = 0
    last: int = 0

    def chunk(self, index: int) -> tuple[int, Box]:
        """(rank, box) of chunk `index`."""
        if self.count == 1:
            return self.rank, Box(self.offset, self.shape)
        dim, shape, offset = self.dim, self.shape, self.offset
        at = offset[dim] + index * self.step
        length = self.last if index == self.count - 1 else shape[dim]
        box = Box(
            (*offset[:dim], at, *offset[dim + 1 :]), (*shape[:dim], length, *shape[dim + 1 :])
        )
        return self.rank + index * self.stride, box

    def __iter__(self) -> Iterator[tuple[int, Box]]:
        return (self.chunk(i) for i in range(self.count))

    def overlapping(self, wanted: Box) -> Iterator[tuple[int, Box]]:
        """The chunks that share an element with `wanted`: arithmetic, not a search."""
        first, stop = 0, self.count
        if self.count > 1:
            start, length = wanted.offset[self.dim], wanted.shape[self.dim]
            origin = self.offset[self.dim]
            first = max(0, (start - origin - self.shape[self.dim]) // self.step + 1)
            stop = min(self.count, -(-(start + length - origin) // self.step))
        for index in range(first, stop):
            rank, box = self.chunk(index)
            if box.intersect(wanted) is not None:
                yield rank, box

    def on(self, rank: int) -> Box | None:
        """The chunk on `rank`, if there is one."""
        index, rest = divmod(rank - self.rank, self.stride)
        return None if rest or not 0 <= index < self.count else self.chunk(index)[1]

    def part(self, first: int, count: int) -> Run:
        """The run of `count` chunks from chunk `first` on."""
        rank, box = self.chunk(first)
        if count == 1:
            return Run(rank, box.offset, box.shape)
        last = self.last if first + count == self.count else self.shape[self.dim]
        return Run(rank, box.offset, box.shape, count, self.stride, self.dim, self.step, last)

    def ranks(self) -> range:
        return range(self.rank, self.rank + (self.count - 1) * self.stride + 1, self.stride)

    def merged(self) -> list[Box]:
        """Boxes that cover the same elements: one when the chunks touch, else all of them."""
        if self.count == 1 or self.step != self.shape[self.dim]:
            return [box for _, box in self]
        length = self.step * (self.count - 1) + self.last
        shape = (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])
        return [Box(self.offset, shape)]

    def to_json(self) -> dict[str, Any]:
        head = {"rank": self.rank, "offset": list(self.offset), "shape": list(self.shape)}
        if self.count == 1:
            return head
        tail = ("count", "stride", "dim", "step", "last")
        return head | {name: getattr(self, name) for name in tail}


def run_from_json(record: dict[str, Any], shape: tuple[int, ...], world_size: int) -> Run:
    """A run of a tensor of global `shape`, with every number checked. Raises ValueError on a lie."""
    if not isinstance(record, dict):
        raise ValueError(f"a run is no object: {record!r}")
    unknown = set(record) - set(Run.__dataclass_fields__)
    if unknown:
        raise ValueError(f"a run has the unknown fields {sorted(unknown)}")
    offset, box_shape = _ints(record.get("offset")), _ints(record.get("shape"))
    scalars = {name: record[name] for name in record if name not in ("offset", "shape")}
    if "rank" not in scalars or not all(type(v) is int and v >= 0 for v in scalars.values()):
        raise ValueError("a run's numbers are not all natural numbers")
    run = Run(offset=offset, shape=box_shape, **scalars)
    if len(offset) != len(shape) or len(box_shape) != len(shape):
        raise ValueError(f"a run has another number of dimensions than the tensor's {len(shape)}")
    if run.count < 1 or run.rank + (run.count - 1) * run.stride >= world_size:
        raise ValueError(f"a run names a rank outside of world size {world_size}")
    if run.count > 1 and not _row_is_sound(run):
        raise ValueError("a run's chunks overlap or have no extent")
    first, final = run.chunk(0)[1], run.chunk(run.count - 1)[1]
    for box in (first, final):
        if any(a + n > s for a, n, s in zip(box.offset, box.shape, shape, strict=True)):
            raise ValueError(f"a run reaches outside of shape {list(shape)}")
    return run


def _row_is_sound(run: Run) -> bool:
    return (
        run.dim < len(run.shape)
        and run.stride > 0
        and 0 < run.last <= run.shape[run.dim] <= run.step
    )


def _ints(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError(f"expected a list of natural numbers, found {value!r}")
    return tuple(value)


def even_run(box: Box, dim: int, parts: int) -> Run:
    """The pieces that have elements when `box` is cut evenly along `dim`, as `split_evenly` does, on ranks 0, 1, ..."""
    if parts == 1 or not box.numel:
        return Run(0, box.offset, box.shape)
    length = box.shape[dim]
    size = -(-length // parts)
    count = -(-length // size)
    shape = (*box.shape[:dim], size, *box.shape[dim + 1 :])
    if count == 1:
        return Run(0, box.offset, shape)
    return Run(0, box.offset, shape, count, 1, dim, size, length - (count - 1) * size)


def encode_runs(chunks: Iterable[tuple[int, Box]]) -> tuple[Run, ...]:
    """The given chunks as runs, in order, each as long as possible."""
    runs: list[Run] = []
    row: list[tuple[int, Box]] = []
    for item in chunks:
        if row and _extends(row, item):
            row.append(item)
            continue
        if row:
            runs.append(_as_run(row))
        row = [item]
    if row:
        runs.append(_as_run(row))
    return tuple(runs)


def _extends(row: Sequence[tuple[int, Box]], item: tuple[int, Box]) -> bool:
    """Whether `item` is the next chunk of the run that `row` forms."""
    (rank0, first), (rank1, previous), (rank2, box) = row[0], row[-1], item
    moved = [d for d, (a, b) in enumerate(zip(previous.offset, box.offset, strict=True)) if a != b]
    if len(moved) != 1 or rank2 <= rank1 or previous.shape != first.shape:
        return False
    dim = moved[0]
    same = all(
        d == dim or n == m for d, (n, m) in enumerate(zip(first.shape, box.shape, strict=True))
    )
    step = box.offset[dim] - previous.offset[dim]
    if not same or box.shape[dim] > first.shape[dim] or step < first.shape[dim]:
        return False
    if len(row) == 1:
        return True
    second_rank, second = row[1]
    return (
        first.offset[dim] != second.offset[dim]
        and step == second.offset[dim] - first.offset[dim]
        and rank2 - rank1 == second_rank - rank0
    )


def _as_run(row: Sequence[tuple[int, Box]]) -> Run:
    (rank, first), (_, final) = row[0], row[-1]
    if len(row) == 1:
        return Run(rank, first.offset, first.shape)
    second_rank, second = row[1]
    dim = next(d for d, a in enumerate(first.offset) if a != second.offset[d])
    step = second.offset[dim] - first.offset[dim]
    return Run(
        rank, first.offset, first.shape, len(row), second_rank - rank, dim, step, final.shape[dim]
    )


def runs_coverage_error(shape: Sequence[int], runs: Iterable[Run]) -> str | None:
    """`coverage_error` for runs: costs the number of runs, not of ranks, when their chunks touch or interleave."""
    return coverage_error(shape, [box for comb in _combs(runs) for box in _filled(comb)])


def _combs(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of equal period that begin within one period of each other, together: they may fill each other's gaps."""
    combs: list[list[Run]] = []
    for run in sorted(runs, key=lambda r: (r.dim, r.step, r.count, r.offset[r.dim : r.dim + 1])):
        first = combs[-1][0] if combs else run
        alike = (run.dim, run.step, run.count) == (first.dim, first.step, first.count)
        if (
            combs
            and alike
            and run.count > 1
            and run.offset[run.dim] - first.offset[run.dim] < run.step
        ):
            combs[-1].append(run)
        else:
            combs.append([run])
    return combs


def _filled(comb: list[Run]) -> list[Box]:
    """Boxes that cover the same as the chunks of a comb: few when the runs fill each other's gaps, else all chunks."""
    run = comb[0]
    if len(comb) == 1:
        return run.merged()
    firsts = [each.chunk(0)[1] for each in comb]
    hull = _hull(firsts)
    inner = [box.relative_to(hull) for box in firsts]
    if hull.shape[run.dim] != run.step or coverage_error(hull.shape, inner) is not None:
        return [box for each in comb for box in each.merged()]
    length = run.step * (run.count - 1)
    shape = (*hull.shape[: run.dim], length, *hull.shape[run.dim + 1 :])
    return [Box(hull.offset, shape), *(each.chunk(run.count - 1)[1] for each in comb)]


def _hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around `boxes`."""
    starts = tuple(map(min, zip(*(box.offset for box in boxes), strict=True)))
    ends = (tuple(b.offset[d] + b.shape[d] for b in boxes) for d in range(len(starts)))
    return Box(starts, tuple(max(end) - start for end, start in zip(ends, starts, strict=True)))
