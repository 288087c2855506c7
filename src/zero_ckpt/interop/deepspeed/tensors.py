"""Where a tensor's elements lie in files: pure arithmetic on records, no bytes.

DeepSpeed stores most tensors in pieces of flat partitions: ranks of a group lay their parameters end to end, pad the
end, and cut the whole into equal parts. A `Tensor` says, for a global tensor, which ranges of which files hold which of
its elements, in row-major order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

from zero_ckpt.core.dtypes import itemsize

__all__ = ["Flat", "LayoutError", "Part", "Piece", "Storage", "StoredTensor", "Tensor", "joined"]


class LayoutError(Exception):
    """What a file says of its tensors does not fit together. The text says what was expected and found."""


@dataclass(slots=True, eq=False)
class Storage:
    """Memory that tensors are views of. `file`: number of the source; `begin`: its address there, known once opened."""

    dtype: str
    nbytes: int
    key: str
    file: int = -1
    begin: int = 0
    views: list[StoredTensor] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class StoredTensor:
    """A view of a storage: `offset` and `strides` in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def span(self) -> int:
        """Bytes of the storage up to the last element."""
        if not self.numel:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (self.offset + last + 1) * itemsize(self.dtype)

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return not self.numel
            expected *= n
        return True

    @property
    def begin(self) -> int:
        """The address of the first element."""
        return self.storage.begin + self.offset * itemsize(self.dtype)

    @property
    def memory(self) -> tuple[object, ...]:
        """Equal for two entries that are one tensor, as tied weights are."""
        return id(self.storage), self.offset, self.shape, self.strides, self.dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start .. start + count` of a part, row-major, lie at address `begin` of file number `file`."""

    file: int
    begin: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor, cut row-major into pieces: what one tensor-parallel rank has of it, and mostly all of it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A whole tensor. Its parts tile it."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of a tensor that has only one part."""
        return self.parts[0].pieces

    @classmethod
    def of_pieces(cls, dtype: str, shape: Sequence[int], pieces: Iterable[Piece]) -> Tensor:
        """Raises `LayoutError` when the pieces do not cover `shape` exactly, in order."""
        found, at = tuple(piece for piece in pieces if piece.count), 0
        for piece in found:
            if piece.start != at:
                raise LayoutError(f"element {at} expected next, {piece.start} found")
            at += piece.count
        if at != prod(shape):
            raise LayoutError(
                f"{prod(shape)} elements expected for shape {list(shape)}, {at} found"
            )
        return cls(dtype, tuple(shape), (Part((0,) * len(shape), tuple(shape), found),))

    @classmethod
    def of_stored(cls, stored: StoredTensor, shape: Sequence[int] | None = None) -> Tensor:
        """A contiguous stored tensor, as it is or with another shape of as many elements."""
        if not stored.is_contiguous:
            raise LayoutError(f"a contiguous tensor expected, strides {list(stored.strides)} found")
        shape = stored.shape if shape is None else tuple(shape)
        piece = Piece(stored.storage.file, stored.begin, 0, stored.numel)
        return cls.of_pieces(stored.dtype, shape, [piece])


@dataclass(slots=True)
class Flat:
    """Stored tensors end to end, as one vector: the partitions of a group, in the order of their ranks."""

    sources: Sequence[StoredTensor]
    _ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        odd = [source for source in self.sources if not source.is_contiguous]
        if odd or len({source.dtype for source in self.sources}) > 1:
            raise LayoutError("contiguous partitions of one dtype expected, others found")
        self._ends = list(accumulate(source.numel for source in self.sources))

    @property
    def dtype(self) -> str:
        return self.sources[0].dtype if self.sources else "F32"

    @property
    def numel(self) -> int:
        return self._ends[-1] if self._ends else 0

    def pieces(self, begin: int, count: int, start: int = 0) -> list[Piece]:
        """Where elements `begin .. begin + count` lie, as elements `start` and following of a tensor."""
        found, end = [], begin + count
        if end > self.numel:
            raise LayoutError(f"{end} elements expected in the partitions, {self.numel} found")
        index = bisect_right(self._ends, begin)
        while begin < end:
            source = self.sources[index]
            offset = begin - (self._ends[index] - source.numel)
            taken = min(end, self._ends[index]) - begin
            if taken:
                address = source.begin + offset * itemsize(source.dtype)
                found.append(Piece(source.storage.file, address, start, taken))
            begin, start, index = begin + taken, start + taken, index + 1
        return found


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """The tensors of tensor-parallel ranks, end to end along `dim`. Raises `LayoutError` for shapes that do not fit."""
    first = tensors[0]
    rests = {(t.dtype, t.shape[:dim], t.shape[dim + 1 :]) for t in tensors}
    if len(rests) > 1:
        raise LayoutError(
            f"shapes that differ only in dimension {dim} expected, {[list(t.shape) for t in tensors]} found"
        )
    parts, at = [], 0
    for tensor in tensors:
        for part in tensor.parts:
            offset = (*part.offset[:dim], part.offset[dim] + at, *part.offset[dim + 1 :])
            parts.append(Part(offset, part.shape, part.pieces))
        at += tensor.shape[dim]
    shape = (*first.shape[:dim], at, *first.shape[dim + 1 :])
    return Tensor(first.dtype, shape, tuple(parts))
