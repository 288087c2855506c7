"""Pipeline parallelism: layer files, and which stage's optimizer steps which layers. Pure.

A layer file holds the layer's own state dict; its parameters are called `<layer>.<name>` in the whole model. Layers
that stages share (`TiedLayerSpec`) are called `tied_modules.<key>.<name>` there, and their files do not say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zero_ckpt.interop.deepspeed.column import Column

__all__ = ["TIED", "drop_doubles", "drop_tied", "stage_names"]

TIED = "tied again: "
"""Begins the names of tied parameters of which it is not known what they are tied to. See `stage_names`."""

Shape = tuple[int, ...]


def drop_tied(column: Column) -> None:
    """Take out of `module` the tensors that `masters` has under the name of a tied layer."""
    tied = {
        (name.split(".", 2)[2], tensor.shape)
        for name, tensor in column.masters.items()
        if name.startswith("tied_modules.") and name.count(".") >= 2
    }
    for name in list(column.module):
        inner = (name.partition(".")[2], column.module[name].shape)
        if name not in column.masters and inner in tied:
            del column.module[name]
            column.order = [other for other in column.order if other != name]


def stage_names(
    stages: Sequence[Sequence[Shape | None] | None], candidates: Mapping[str, Shape]
) -> list[dict[str, Shape]] | None:
    """The parameters of each stage's optimizer, in its order; None where nothing fits.

    Stages have consecutive layers. A later stage may begin with parameters of layers tied to an earlier one; where
    their shapes do not tell which, their names here begin with `TIED`.
    """
    names = list(candidates)
    at, found = 0, list[dict[str, Shape]]()
    for shapes in stages:
        taken = None if shapes is None else _take(shapes, names[at:], candidates, names[:at])
        if taken is None:
            return None
        found.append(taken)
        at += sum(name in names[at:] for name in taken)
    return found if at == len(names) else None


def _take(
    shapes: Sequence[Shape | None],
    names: Sequence[str],
    candidates: Mapping[str, Shape],
    earlier: Sequence[str],
) -> dict[str, Shape] | None:
    for tied in range(len(shapes) + 1 if earlier else 1):
        rest = shapes[tied:]
        chosen = names[: len(rest)]
        if len(chosen) == len(rest) and all(
            shape in (None, candidates[name]) for shape, name in zip(rest, chosen, strict=True)
        ):
            again = _again(shapes[:tied], earlier, candidates)
            return again | {name: candidates[name] for name in chosen}
    return None


def _again(
    shapes: Sequence[Shape | None], earlier: Sequence[str], candidates: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Parameters of tied layers, by the earlier one of their shape where there is only one."""
    found: dict[str, Shape] = {}
    for index, shape in enumerate(shapes):
        same = [name for name in earlier if candidates[name] == shape and name not in found]
        found[same[0] if len(same) == 1 else f"{TIED}{index}"] = shape or ()
    return found


def drop_doubles(column: Column) -> None:
    """Take out the parameters whose names begin with `TIED`: an earlier stage has them, too."""
    for found in (column.masters, column.states):
        for name in [name for name in found if name.startswith(TIED)]:
            del found[name]
    for group in column.groups:
        group.names = [name for name in group.names if not name.startswith(TIED)]
