"""What property tests draw: shapes, boxes, meshes and layouts; and brute force to compare with."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import strategies as st

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.layout import Layout, Mesh, local_box

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
filled_shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    extent = tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, offset, strict=True))
    return Box(offset, extent)


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that tile a tensor of `shape`: it is cut again and again."""
    whole = Box((0,) * len(shape), shape)
    boxes = [whole]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.shape[dim]))
        for start, length in ((0, cut), (cut, box.shape[dim] - cut)):
            offset, extent = list(box.offset), list(box.shape)
            offset[dim], extent[dim] = offset[dim] + start, length
            boxes.append(Box(tuple(offset), tuple(extent)))
    return draw(st.permutations(boxes))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...] | None = None, ranks: int = 8) -> Layout:
    """A tensor on a mesh of up to three dimensions over some of `ranks`; any placements DTensor can have."""
    shape = draw(shapes) if shape is None else shape
    mesh_shape = draw(
        st.lists(st.integers(1, 4), min_size=1, max_size=3)
        .map(tuple)
        .filter(lambda s: int(np.prod(s)) <= ranks)
    )
    chosen = draw(st.permutations(range(ranks)))[: int(np.prod(mesh_shape))]
    placement = st.sampled_from(["R", *(f"{kind}{d}" for kind in "ST" for d in range(len(shape)))])
    placements = tuple(draw(placement) for _ in mesh_shape)
    return Layout("F32", shape, Mesh(mesh_shape, tuple(chosen)), placements)


def counts(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    """How many of the boxes hold each element."""
    found = np.zeros(shape, dtype=int)
    for box in boxes:
        found[box.slices()] += 1
    return found


def held_boxes(layout: Layout) -> dict[int, Box]:
    """rank -> the box that it holds of a tensor on a mesh."""
    mesh = layout.mesh
    assert mesh is not None
    coordinates = product(*(range(n) for n in mesh.shape))
    return {
        rank: local_box(layout.shape, mesh.shape, layout.placements, coordinate)
        for rank, coordinate in zip(mesh.ranks, coordinates, strict=True)
    }
