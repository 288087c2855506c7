"""Layouts: how one tensor lies on the ranks of a job, and the table of all of a rank's tensors. Pure.

A `Layout` is what DTensor calls mesh and placements, in plain integers and strings, so that any rank can compute what
every other rank holds. Placements, one per mesh dimension:

    "R"      replicated
    "S<d>"   split along tensor dimension d into pieces of ceil(n / parts), as `torch.chunk` does
    "T<d>"   split along d, after the mesh dimensions to its right have split d (DTensor's strided shard: FSDP over
             tensor parallelism)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import xxhash

from zero_ckpt.core.chunks import Box, split_evenly
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.experts import ExpertNotes

__all__ = ["MAX_DIMS", "ROLES", "Layout", "Mesh", "Table", "local_box", "split_order"]

ROLES = ("model", "optim", "state")
"""What a shard file may hold: parameters and buffers; optimizer state; objects."""

MAX_DIMS = 64
"""The number of dimensions that a torch tensor may have."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Global ranks in row-major order over `shape`."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    def __hash__(self) -> int:
        """Cheap: every layout is looked up by its mesh, which may have thousands of ranks."""
        return hash((self.shape, self.ranks[:1], self.ranks[-1:]))

    def coordinates(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(rank, coordinate) of every position, row-major."""
        return zip(self.ranks, product(*(range(n) for n in self.shape)), strict=True)


@dataclass(frozen=True, slots=True)
class Layout:
    """dtype name, global shape, and where the elements are.

    `mesh` None: every rank that has the tensor has all of it. `whole`: never split among replicas, because replicas
    may differ (buffers, objects): the lowest rank's value counts.
    """

    dtype: str
    shape: tuple[int, ...]
    mesh: Mesh | None = None
    placements: tuple[str, ...] = ()
    whole: bool = False

    def __hash__(self) -> int:
        """Cheap, as that of `Mesh`: a job's layouts differ in what is hashed, and seldom in the rest."""
        return hash((self.dtype, self.shape, self.placements))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)

    def to_json(self) -> dict[str, Any]:
        mesh = self.mesh and [list(self.mesh.shape), list(self.mesh.ranks)]
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "mesh": mesh,
            "placements": list(self.placements),
            "whole": self.whole,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Layout:
        mesh = record["mesh"] and Mesh(tuple(record["mesh"][0]), tuple(record["mesh"][1]))
        return cls(
            record["dtype"],
            tuple(record["shape"]),
            mesh or None,
            tuple(record["placements"]),
            record["whole"],
        )


def local_box(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[str, ...],
    coordinate: tuple[int, ...],
) -> Box:
    """The box of a tensor of `shape` that the rank at `coordinate` of the mesh holds."""
    offset, extent = [0] * len(shape), list(shape)
    for i in split_order(placements):
        dim = int(placements[i][1:])
        start, length = split_evenly(extent[dim], mesh_shape[i], coordinate[i])
        offset[dim], extent[dim] = offset[dim] + start, length
    return Box(tuple(offset), tuple(extent))


def split_order(placements: Sequence[str]) -> list[int]:
    """The mesh dimensions that split the tensor, in the order in which they split it."""
    plain = [i for i, p in enumerate(placements) if p[0] == "S"]
    strided = [i for i, p in enumerate(placements) if p[0] == "T"]
    return plain + strided[::-1]


@dataclass(slots=True)
class Table:
    """Every tensor of one rank: role -> key -> layout. Ranks with equal tables have equal digests.

    `experts`: notes on the tensors of experts that live on this rank and not on all.
    """

    roles: dict[str, dict[str, Layout]] = field(
        default_factory=lambda: {role: {} for role in ROLES}
    )
    experts: ExpertNotes = field(default_factory=ExpertNotes)

    def to_bytes(self) -> bytes:
        """Layouts once each, then role -> key -> index: the order of keys counts."""
        index: dict[Layout, int] = {}
        # A layout is as long as its mesh, so equal ones are mostly found as the same object.
        objects = {id(layout): layout for keys in self.roles.values() for layout in keys.values()}
        at = {name: index.setdefault(layout, len(index)) for name, layout in objects.items()}
        roles = {
            role: {key: at[id(layout)] for key, layout in keys.items()}
            for role, keys in self.roles.items()
        }
        layouts = [layout.to_json() for layout in index]
        record = {"layouts": layouts, "roles": roles, "experts": self.experts.to_json()}
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Table:
        record = json.loads(data)
        layouts = [Layout.from_json(item) for item in record["layouts"]]
        return cls(
            {
                role: {key: layouts[i] for key, i in keys.items()}
                for role, keys in record["roles"].items()
            },
            ExpertNotes.from_json(record["experts"]),
        )

    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.to_bytes())
