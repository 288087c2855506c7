"""ZeRO stage 1 and 2 (and `BF16_Optimizer`): a group's parameters end to end, cut into one partition for each rank.

Facts of the format, from DeepSpeed 0.19:
- The order within a group is that of `param_shapes` in the model file, also with round-robin gradients, where
  `param_slice_mappings` in the partitions keeps another order.
- Each parameter may be followed by padding (`param_alignment_paddings`), the group by more, so that it divides evenly.
- `single_partition_of_fp32_groups` has the padding at the end cut off (not so `BF16_Optimizer`'s), moments keep it.
  Since only the end of a group is padding, end-to-end partitions give every parameter its place in either case.
- An expert group is partitioned among the ranks that hold the same experts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from zero_ckpt.interop.deepspeed.column import (
    Column,
    Group,
    Value,
    number_of,
    shapes_by_group,
    zero_options,
)
from zero_ckpt.interop.deepspeed.experts import count_experts, global_name, ranks_of_experts
from zero_ckpt.interop.deepspeed.records import Record
from zero_ckpt.interop.deepspeed.tensors import Flat, LayoutError, StoredTensor, Tensor

__all__ = ["read_partitions"]

Shapes = Mapping[str, tuple[int, ...]]

_ALIGNMENT = 2
"""A group is padded to a multiple of this many elements per rank."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a parameter lies in its group."""

    name: str
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        return self.begin + prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A group of one set of ranks. `numel`: with the padding between parameters."""

    index: int
    slots: tuple[_Slot, ...]
    numel: int
    ranks: tuple[int, ...]


def read_partitions(model: Mapping[str, Any], optims: Sequence[Mapping[str, Any]]) -> Column:
    """`model`: the model file's tree; `optims`: the `optimizer_state_dict` of every rank. Raises `LayoutError`."""
    groups = shapes_by_group(model)
    states, options, problem = _base_states(optims, len(groups))
    layouts = _layouts(groups, optims, options)
    if not zero_options(model).get("round_robin_gradients"):
        _check_slices(layouts, optims)
    column = Column(problem=problem)
    column.groups = [
        Group(options=options[g] if g < len(options) else {}) for g in range(len(groups))
    ]
    for layout in layouts:
        partitions = [_partition(optims[rank], layout.index, rank) for rank in layout.ranks]
        flat = Flat(partitions)
        _check_length(layout, flat, optims)
        column.masters |= _tensors(layout, flat)
        column.groups[layout.index].names += [slot.name for slot in layout.slots]
        if not column.problem:
            try:
                found = [states[rank][layout.index] for rank in layout.ranks]
                _add_states(column, layout, found, options[layout.index])
            except LayoutError as error:
                column.problem = f"group {layout.index}: {error}"
    return column


def _partition(optim: Mapping[str, Any], group: int, rank: int) -> StoredTensor:
    found = optim.get("single_partition_of_fp32_groups")
    if not isinstance(found, list) or group >= len(found):
        raise LayoutError(f"rank {rank} has no partition of group {group}")
    partition = found[group]
    if not isinstance(partition, StoredTensor):
        raise LayoutError(f"rank {rank}: the partition of group {group} is no tensor")
    return partition


def _base_states(
    optims: Sequence[Mapping[str, Any]], num_groups: int
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]], str]:
    """(for each rank and group its state, options of the groups, what is wrong with them)."""
    states: list[list[dict[str, Any]]] = []
    options: list[dict[str, Any]] = []
    for rank, optim in enumerate(optims):
        base = optim.get("base_optimizer_state")
        if isinstance(base, list):  # elastic: a state for each group, without options
            steps = optim.get("base_optimizer_state_step")
            step = {} if steps is None else {"step": steps}
            states.append([{**step, **group} for group in base if isinstance(group, dict)])
            options = options or [{} for _ in base]
        elif isinstance(base, dict) and isinstance(base.get("param_groups"), list):
            groups = [g for g in base["param_groups"] if isinstance(g, dict)]
            states.append([_flat_state(base.get("state"), group) for group in groups])
            options = options or [{k: v for k, v in g.items() if k != "params"} for g in groups]
        else:
            return [], [{} for _ in range(num_groups)], f"rank {rank} has no 'base_optimizer_state'"
        if len(states[-1]) != num_groups:
            text = f"rank {rank} has the state of {len(states[-1])} groups, {num_groups} expected"
            return [], [{} for _ in range(num_groups)], text
    return states, options, ""


def _flat_state(state: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group has one parameter here: its partition."""
    numbers = group.get("params")
    if not isinstance(state, dict) or not isinstance(numbers, list) or not numbers:
        return {}
    found = state.get(numbers[0])
    return found if isinstance(found, dict) else {}


def _layouts(
    groups: Sequence[Shapes],
    optims: Sequence[Mapping[str, Any]],
    options: Sequence[Mapping[str, Any]],
) -> list[_Layout]:
    world = len(optims)
    counts = count_experts(name for group in groups for name in group)
    found = []
    for index, shapes in enumerate(groups):
        slots, numel = _slots(shapes, _alignment(optims[0], index, len(shapes)))
        parts = _partition_count(optims[0], index, world)
        if parts == world and not (index < len(options) and options[index].get("moe")):
            found.append(_Layout(index, slots, numel, tuple(range(world))))
            continue
        for expert_rank, ranks in ranks_of_experts(world, parts, _slice_orders(optims, index)):
            named = tuple(
                _Slot(global_name(s.name, expert_rank, counts), s.shape, s.begin) for s in slots
            )
            found.append(_Layout(index, named, numel, ranks))
    return found


def _slots(shapes: Shapes, paddings: Sequence[int]) -> tuple[tuple[_Slot, ...], int]:
    at, found = 0, []
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        found.append(_Slot(name, shape, at))
        at += prod(shape) + padding
    return tuple(found), at


def _alignment(optim: Mapping[str, Any], group: int, count: int) -> list[int]:
    """Elements of padding behind each parameter."""
    found = optim.get("param_alignment_paddings")
    if found is None:
        return [0] * count
    if not isinstance(found, list) or group >= len(found) or len(found[group]) != count:
        raise LayoutError(
            f"param_alignment_paddings of {count} parameters of group {group} expected"
        )
    if not all(type(n) is int and n >= 0 for n in found[group]):
        raise LayoutError("param_alignment_paddings are not all natural numbers")
    return list(found[group])


def _partition_count(optim: Mapping[str, Any], group: int, world: int) -> int:
    found = optim.get("partition_count", world)
    if isinstance(found, list):
        found = found[group] if group < len(found) else world
    if type(found) is not int or found < 1 or world % found:
        raise LayoutError(
            f"group {group} is cut into {found!r} partitions, and there are {world} ranks"
        )
    return found


def _check_length(layout: _Layout, flat: Flat, optims: Sequence[Mapping[str, Any]]) -> None:
    excess = flat.numel - layout.numel
    keeps_padding = "zero_stage" not in optims[0]  # BF16_Optimizer
    if not 0 <= excess < (_ALIGNMENT * len(layout.ranks) if keeps_padding else 1):
        raise LayoutError(
            f"group {layout.index}: {layout.numel} elements expected by param_shapes, {flat.numel} found in the "
            f"partitions of ranks {list(layout.ranks)}: they are not of one save"
        )


def _tensors(layout: _Layout, flat: Flat) -> dict[str, Tensor]:
    found = {}
    for slot in layout.slots:
        pieces = flat.pieces(slot.begin, slot.end - slot.begin)
        found[slot.name] = Tensor.of_pieces(flat.dtype, slot.shape, pieces)
    return found


def _add_states(
    column: Column,
    layout: _Layout,
    states: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> None:
    """Every entry of the ranks' states, for each parameter: its slice of a partition, or the group's number."""
    names = {name for state in states for name in state}
    for name in sorted(names):
        values = [state.get(name) for state in states]
        for slot, value in zip(layout.slots, _state_values(name, values, layout), strict=True):
            if value is not None:
                column.states.setdefault(slot.name, {})[name] = value


def _state_values(name: str, values: Sequence[Any], layout: _Layout) -> list[Value | None]:
    if all(isinstance(v, StoredTensor) and v.shape == () for v in values):
        shared = Tensor.of_stored(values[0])
        return [shared] * len(layout.slots)
    numbers = {number_of(v) for v in values}
    if len(numbers) == 1 and (number := numbers.pop()) is not None:
        return [number] * len(layout.slots)
    if all(v is None for v in values):
        return [None] * len(layout.slots)
    partitions = [v for v in values if isinstance(v, StoredTensor)]
    if len(partitions) != len(values):
        raise LayoutError(f"state '{name}' is a tensor on some ranks only")
    flat = Flat(partitions)
    if flat.numel < layout.numel:
        raise LayoutError(
            f"state '{name}' has {flat.numel} elements, where the parameters have {layout.numel}"
        )
    return list(_tensors(layout, flat).values())


def _slices(optim: Mapping[str, Any], group: int) -> dict[str, tuple[int, int]] | None:
    """name -> (start, numel) in the rank's partition; None where the file does not say."""
    found = optim.get("param_slice_mappings")
    if not isinstance(found, list) or group >= len(found) or not isinstance(found[group], dict):
        return None
    slices = {}
    for name, record in found[group].items():
        if not isinstance(record, Record):
            return None
        start, numel = record.get("start"), record.get("numel")
        if type(start) is not int or type(numel) is not int:
            return None
        slices[str(name)] = start, numel
    return slices


def _slice_orders(optims: Sequence[Mapping[str, Any]], group: int) -> list[Any]:
    """For each rank something that is equal for ranks that hold the same slice of their experts."""
    return [sorted((_slices(optim, group) or {}).items()) for optim in optims]


def _check_slices(layouts: Sequence[_Layout], optims: Sequence[Mapping[str, Any]]) -> None:
    """Raises `LayoutError` where partitions say that they hold something else than `param_shapes` implies."""
    for layout in layouts:
        if layout.ranks != tuple(range(len(optims))):
            continue  # names of experts are local there
        begin = 0
        for rank in layout.ranks:
            partition = _partition(optims[rank], layout.index, rank)
            slices = _slices(optims[rank], layout.index)
            if slices is None:
                return
            _check_slice(layout, slices, begin, partition.numel, rank)
            begin += partition.numel


def _check_slice(
    layout: _Layout, slices: Mapping[str, tuple[int, int]], begin: int, length: int, rank: int
) -> None:
    expected = {
        slot.name: (
            max(slot.begin, begin) - begin,
            min(slot.end, begin + length) - max(slot.begin, begin),
        )
        for slot in layout.slots
        if min(slot.end, begin + length) > max(slot.begin, begin)
    }
    found = {name: place for name, place in slices.items() if place[1]}
    if found != expected:
        odd = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        raise LayoutError(
            f"group {layout.index}, rank {rank}: parameter '{odd[0]}' at (start, numel) {expected.get(odd[0])} "
            f"expected by param_shapes, {found.get(odd[0])} found in param_slice_mappings"
        )
