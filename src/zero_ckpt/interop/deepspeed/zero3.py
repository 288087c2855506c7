"""ZeRO stage 3: each parameter is cut by itself, into one piece of ceil(numel / ranks) elements for each rank.

Facts of the format, from DeepSpeed 0.19: a rank's pieces lie end to end in `fp32_flat_groups`, one vector for each
sub-group of parameters; the last rank's piece is padded. `param_shapes` lists the parameters in that order. There is
one optimizer state for each sub-group, as long as its vector; `param_groups` lists the sub-groups of each group.
Frozen parameters are cut the same way, in `frozen_param_fragments` of every rank's model file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

from zero_ckpt.interop.deepspeed.column import (
    Column,
    Group,
    Value,
    named_shapes,
    number_of,
    shapes_by_group,
    stored_items,
    zero_options,
)
from zero_ckpt.interop.deepspeed.tensors import Flat, LayoutError, Piece, StoredTensor, Tensor

__all__ = ["read_frozen", "read_pieces"]

Shapes = Mapping[str, tuple[int, ...]]


def read_pieces(model: Mapping[str, Any], optims: Sequence[Mapping[str, Any]]) -> Column:
    """`model`: rank 0's model file's tree; `optims`: every rank's `optimizer_state_dict`. Raises `LayoutError`."""
    for optim in optims:
        if optim.get("ds_zero_partition_groups") is not None:
            raise LayoutError("experts that ZeRO-3 partitions (AutoEP) are not read")
    listed = shapes_by_group(model)
    shapes = {name: shape for group in listed for name, shape in group.items()}
    vectors = [Flat(_sub_groups(optim, rank)) for rank, optim in enumerate(optims)]
    _check_lengths(shapes, vectors)
    column = Column(masters=_cut(shapes, vectors))
    try:
        lengths = [tensor.numel for tensor in _sub_groups(optims[0], 0)]
        homes = _homes(listed, lengths, len(optims))
        _add_states(column, shapes, optims, homes)
    except LayoutError as error:
        column.problem, column.states = str(error), {}
        column.groups = [Group(list(shapes))]
    return column


def _sub_groups(optim: Mapping[str, Any], rank: int) -> list[StoredTensor]:
    found = optim.get("fp32_flat_groups")
    if not isinstance(found, list) or not all(isinstance(t, StoredTensor) for t in found):
        raise LayoutError(f"rank {rank} has no list of tensors 'fp32_flat_groups'")
    return found


def _share(shape: Sequence[int], world: int) -> int:
    """Elements of a parameter that a rank has, with padding."""
    return -(-prod(shape) // world)


def _check_lengths(shapes: Shapes, vectors: Sequence[Flat]) -> None:
    expected = sum(_share(shape, len(vectors)) for shape in shapes.values())
    for rank, vector in enumerate(vectors):
        if vector.numel == 0 and expected:
            raise LayoutError(
                f"rank {rank}: its part of the masters is empty: it was swapped out to NVMe, into files whose "
                "layout is not known"
            )
        if vector.numel != expected:
            raise LayoutError(
                f"rank {rank}: {expected} elements expected by param_shapes for {len(vectors)} ranks, "
                f"{vector.numel} found in its partition: the files are not of one save"
            )


def _cut(shapes: Shapes, vectors: Sequence[Flat]) -> dict[str, Tensor]:
    """Every parameter's pieces, from all ranks' vectors."""
    at, found, world = 0, {}, len(vectors)
    for name, shape in shapes.items():
        numel, share = prod(shape), _share(shape, world)
        pieces: list[Piece] = []
        for rank, vector in enumerate(vectors):
            start = min(rank * share, numel)
            pieces += vector.pieces(at, min(share, numel - start), start)
        found[name] = Tensor.of_pieces(vectors[0].dtype, shape, pieces)
        at += share
    return found


def _homes(listed: Sequence[Shapes], lengths: Sequence[int], world: int) -> list[list[str]]:
    """The parameters of each sub-group: as `param_shapes` lists them, or by their places (older versions)."""
    sums = [sum(_share(shape, world) for shape in group.values()) for group in listed]
    if sums == list(lengths):
        return [list(group) for group in listed]
    shapes = {name: shape for group in listed for name, shape in group.items()}
    ends, found = list(accumulate(lengths)), [list[str]() for _ in lengths]
    at = index = 0
    for name, shape in shapes.items():
        share = _share(shape, world)
        while index < len(ends) - 1 and at + share > ends[index] and at >= ends[index]:
            index += 1
        if share and at + share > ends[index]:
            raise LayoutError(f"parameter '{name}' lies in two sub-groups")
        found[index].append(name)
        at += share
    return found


def _add_states(
    column: Column,
    shapes: Shapes,
    optims: Sequence[Mapping[str, Any]],
    homes: Sequence[Sequence[str]],
) -> None:
    bases = [_base(optim, rank) for rank, optim in enumerate(optims)]
    for group in bases[0]["param_groups"]:
        options = {k: v for k, v in group.items() if k != "params"}
        numbers = group.get("params")
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < len(homes) for n in numbers
        ):
            raise LayoutError(f"a group lists the sub-groups {numbers!r}, there are {len(homes)}")
        column.groups.append(Group([name for n in numbers for name in homes[n]], options))
        for number in numbers:
            states = [_state(base, number) for base in bases]
            found = _sub_group_states({n: shapes[n] for n in homes[number]}, states)
            for name, values in found.items():
                column.states[name] = values


def _base(optim: Mapping[str, Any], rank: int) -> dict[str, Any]:
    base = optim.get("optimizer_state_dict")
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(groups, list):
        raise LayoutError(f"rank {rank} has no 'optimizer_state_dict'")
    if not all(isinstance(group, dict) for group in groups):
        raise LayoutError(f"rank {rank}: its parameter groups are no mappings")
    return base


def _state(base: Mapping[str, Any], number: int) -> dict[str, Any]:
    state = base.get("state")
    found = state.get(number) if isinstance(state, dict) else None
    return found if isinstance(found, dict) else {}


def _sub_group_states(
    shapes: Shapes, states: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Value]]:
    found: dict[str, dict[str, Value]] = {}
    for key in sorted({key for state in states for key in state}):
        values = [state.get(key) for state in states]
        if all(v is None for v in values):
            continue
        for name, value in _split(key, values, shapes).items():
            found.setdefault(name, {})[key] = value
    return found


def _split(key: str, values: Sequence[Any], shapes: Shapes) -> Mapping[str, Value]:
    if all(isinstance(v, StoredTensor) and v.shape == () for v in values):
        return dict.fromkeys(shapes, Tensor.of_stored(values[0]))
    numbers = {number_of(v) for v in values}
    if len(numbers) == 1 and (number := numbers.pop()) is not None:
        return dict.fromkeys(shapes, number)
    vectors = [Flat([v]) for v in values if isinstance(v, StoredTensor)]
    if len(vectors) != len(values):
        raise LayoutError(f"state '{key}' is a tensor on some ranks only")
    expected = sum(_share(shape, len(values)) for shape in shapes.values())
    odd = [vector.numel for vector in vectors if vector.numel != expected]
    if odd:
        raise LayoutError(f"state '{key}' has {odd[0]} elements, its sub-group {expected}")
    return _cut(shapes, vectors)


def read_frozen(models: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Frozen parameters, from the model files of all ranks. Raises `LayoutError`."""
    shapes = models[0].get("frozen_param_shapes")
    if not shapes or not models[0].get("frozen_param_fragments"):
        return {}
    if zero_options(models[0]).get("zero_quantized_nontrainable_weights"):
        raise LayoutError(
            "frozen parameters were quantized (zero_quantized_nontrainable_weights), and their scales were not saved"
        )
    found = {}
    for name, shape in named_shapes(shapes, "frozen_param_shapes").items():
        fragments = []
        for rank, model in enumerate(models):
            fragment = dict(stored_items(model.get("frozen_param_fragments"))).get(name)
            if fragment is None:
                raise LayoutError(f"rank {rank} has no piece of the frozen parameter '{name}'")
            fragments.append(fragment)
        found[name] = _frozen(name, shape, fragments)
    return found


def _frozen(name: str, shape: tuple[int, ...], fragments: Sequence[StoredTensor]) -> Tensor:
    share = _share(shape, len(fragments))
    if not prod(shape):
        return Tensor.of_pieces(fragments[0].dtype, shape, [])
    odd = [fragment.numel for fragment in fragments if fragment.numel != share]
    if odd:
        raise LayoutError(
            f"frozen parameter '{name}' of shape {list(shape)}: pieces of {share} elements expected, {odd[0]} found"
        )
    return _cut({name: shape}, [Flat([fragment]) for fragment in fragments])[name]
