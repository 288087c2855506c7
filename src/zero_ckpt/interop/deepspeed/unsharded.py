"""No ZeRO (stage 0): the optimizer's own state dict, whose parameters are numbers without names.

Parameters of a group are in the order of the module's, so their shapes give them their names: where shapes leave more
than one way, there is no optimizer state, rather than a wrong one. In 16-bit training the fp32 masters lie beside
it: a list of tensors (`fp32_groups`), or a vector for each group (`fp32_groups_flat`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from zero_ckpt.interop.deepspeed.column import Column, Group, Value, number_of
from zero_ckpt.interop.deepspeed.matching import Ambiguous, match_shapes
from zero_ckpt.interop.deepspeed.tensors import Flat, LayoutError, StoredTensor, Tensor

__all__ = ["flat_shapes", "read_unsharded"]

Shape = tuple[int, ...]
Names = Mapping[str, Shape]


def read_unsharded(optimizer: Any, candidates: Names) -> Column:
    """`optimizer`: what the file has of that name; `candidates`: the parameters it may be about, in order.

    Never raises for what it cannot read: the column then has a `problem`, and no masters.
    """
    column = Column()
    if not isinstance(optimizer, dict):
        return column  # there was none
    try:
        flat = optimizer.get("fp32_groups_flat")
        lists = optimizer.get("fp32_groups")
        if isinstance(flat, list):
            _read_flat(column, flat, _inner(optimizer), candidates)
        else:
            inner = _inner(optimizer) if isinstance(lists, list) else optimizer
            _read_single(column, lists, inner, candidates)
    except (LayoutError, Ambiguous) as error:
        return Column(problem=str(error))
    return column


def flat_shapes(optimizer: Any) -> list[Shape | None] | None:
    """The shapes of the one group's parameters, as far as their states tell; None for anything else."""
    try:
        lists = optimizer.get("fp32_groups")
        inner = _inner(optimizer) if isinstance(lists, list) else optimizer
        numbers, _ = _groups(inner)
        states = _states(inner)
    except (LayoutError, AttributeError):
        return None
    if len(numbers) != 1:
        return None
    if isinstance(lists, list) and len(lists) == 1:
        return [master.shape for master in lists[0]]
    return [_shape_of(states.get(number)) for number in numbers[0]]


def _inner(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = optimizer.get("optimizer_state_dict")
    if not isinstance(inner, dict):
        raise LayoutError("masters without an 'optimizer_state_dict'")
    return inner


def _groups(inner: Mapping[str, Any]) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """(numbers of each group's parameters, options)."""
    groups = inner.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise LayoutError("the optimizer's state has no 'param_groups'")
    numbers = [list(group.get("params", [])) for group in groups]
    return numbers, [{k: v for k, v in g.items() if k != "params"} for g in groups]


def _states(inner: Mapping[str, Any]) -> Mapping[Any, Any]:
    state = inner.get("state")
    if not isinstance(state, dict):
        raise LayoutError("the optimizer's state has no 'state'")
    return state


def _read_single(column: Column, masters: Any, inner: Mapping[str, Any], candidates: Names) -> None:
    """A state for each parameter."""
    numbers, options = _groups(inner)
    states = _states(inner)
    shapes: list[list[Shape | None]] = []
    for index, group in enumerate(numbers):
        own = masters[index] if isinstance(masters, list) and index < len(masters) else []
        if own and len(own) != len(group):
            raise LayoutError(f"group {index}: {len(group)} masters expected, {len(own)} found")
        shapes.append(
            [own[i].shape if own else _shape_of(states.get(n)) for i, n in enumerate(group)]
        )
    names = match_shapes(shapes, candidates)
    for index, (group, found) in enumerate(zip(numbers, names, strict=True)):
        column.groups.append(Group(list(found), options[index]))
        for place, (number, name) in enumerate(zip(group, found, strict=True)):
            if isinstance(masters, list):
                column.masters[name] = Tensor.of_stored(masters[index][place])
            values = _values(states.get(number), candidates[name])
            if values:
                column.states[name] = values


def _shape_of(state: Any) -> Shape | None:
    """The shape that a parameter's state implies: that of its largest tensor."""
    if not isinstance(state, dict):
        return None
    found = [v for v in state.values() if isinstance(v, StoredTensor)]
    largest = max(found, key=lambda t: (t.numel, len(t.shape)), default=None)
    if largest is None or (largest.shape == () and set(state) == {"step"}):
        return None
    return largest.shape


def _values(state: Any, shape: Shape) -> dict[str, Value]:
    if not isinstance(state, dict):
        return {}
    found: dict[str, Value] = {}
    for name, value in state.items():
        number = number_of(value)
        if isinstance(value, StoredTensor):
            found[name] = Tensor.of_stored(value)
        elif number is not None:
            found[name] = number
        elif value is not None:
            raise LayoutError(f"optimizer state '{name}' is no tensor or number")
    return found


def _read_flat(
    column: Column, masters: Sequence[Any], inner: Mapping[str, Any], candidates: Names
) -> None:
    """A vector for each group. Its length must leave one way to fill it."""
    numbers, options = _groups(inner)
    states = _states(inner)
    if len(numbers) != 1 or len(masters) != 1 or not isinstance(masters[0], StoredTensor):
        raise LayoutError(
            f"{len(masters)} groups of parameters without names, laid end to end: which is which is not recorded"
        )
    expected = sum(prod(shape) for shape in candidates.values())
    flat = Flat(masters)
    if flat.numel != expected:
        raise LayoutError(f"masters of {expected} elements expected, {flat.numel} found")
    column.groups.append(Group(list(candidates), options[0]))
    column.masters = _cut(flat, candidates)
    state = states.get(numbers[0][0]) if numbers[0] else None
    for name, value in (state or {}).items():
        for key, part in _split(value, candidates, expected, name).items():
            column.states.setdefault(key, {})[name] = part


def _split(value: Any, candidates: Names, numel: int, name: str) -> Mapping[str, Value]:
    number = number_of(value)
    if number is not None:
        return dict.fromkeys(candidates, number)
    if not isinstance(value, StoredTensor):
        raise LayoutError(f"optimizer state '{name}' is no tensor or number")
    if value.shape == ():
        return dict.fromkeys(candidates, Tensor.of_stored(value))
    if value.numel != numel:
        raise LayoutError(f"state '{name}' has {value.numel} elements, the masters {numel}")
    return _cut(Flat([value]), candidates)


def _cut(flat: Flat, candidates: Names) -> dict[str, Tensor]:
    at, found = 0, {}
    for name, shape in candidates.items():
        found[name] = Tensor.of_pieces(flat.dtype, shape, flat.pieces(at, prod(shape)))
        at += prod(shape)
    return found
