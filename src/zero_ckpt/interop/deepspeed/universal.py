"""Universal checkpoints: one folder of whole tensors for each parameter, `zero/<parameter>/{fp32,exp_avg,...}.pt`.

Facts of the format, from DeepSpeed 0.19: a file holds `{"param": tensor, "cat_dim": ...}` after ZeRO stage 1 and 2, and
a bare flat tensor after stage 3. The optimizer's groups and, after stage 3, its step are in `zero/optimizer_state.pt`.
Buffers and, but for stage 1 and 2, frozen parameters are only in the copied model files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from zero_ckpt.interop.deepspeed.column import Column, Group, Value, number_of, shapes_by_group
from zero_ckpt.interop.deepspeed.file_table import FileTable
from zero_ckpt.interop.deepspeed.tensors import LayoutError, StoredTensor, Tensor

__all__ = ["read_universal"]

_MASTER = "fp32"


def read_universal(table: FileTable, models: Sequence[Mapping[str, Any]]) -> Column:
    """`models`: the trees of the model files, one for each model-parallel rank. Raises `LayoutError`."""
    column = Column()
    groups = _groups(models)
    for names in groups:
        for name, shape in names.items():
            _read_parameter(column, table, name, shape)
    try:
        _read_groups(column, table, groups)
    except LayoutError as error:
        column.problem = str(error)
        column.groups = [Group(list(column.masters))]
    return column


def _groups(models: Sequence[Mapping[str, Any]]) -> list[dict[str, tuple[int, ...]]]:
    found: list[dict[str, tuple[int, ...]]] = []
    for model in models:
        for index, shapes in enumerate(shapes_by_group(model)):
            if index == len(found):
                found.append({})
            for name, shape in shapes.items():
                found[index].setdefault(name, shape)
    return found


def _read_parameter(column: Column, table: FileTable, name: str, shape: tuple[int, ...]) -> None:
    folder = f"zero/{name}"
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise LayoutError(f"'{name}' cannot be the name of a folder")
    try:
        files = [e.name for e in table.files.list(f"{table.folder}/{folder}") if not e.is_dir]
    except OSError as error:
        raise LayoutError(
            f"parameter '{name}': its folder '{folder}' cannot be read: {error}"
        ) from error
    for file in files:
        key = file.removesuffix(".pt")
        if key == file:
            continue
        value = _value(table.open(f"{folder}/{file}").tree, shape, f"{folder}/{file}")
        table.forget(f"{folder}/{file}")
        if key != _MASTER:
            column.states.setdefault(name, {})[key] = value
        elif isinstance(value, Tensor):
            column.masters[name] = value
    if name not in column.masters:
        raise LayoutError(f"parameter '{name}': no tensor in '{folder}/{_MASTER}.pt'")


def _value(tree: Any, shape: tuple[int, ...], file: str) -> Value:
    if isinstance(tree, dict):
        tree = tree.get("param")
    number = number_of(tree)
    if number is not None:
        return number
    if not isinstance(tree, StoredTensor):
        raise LayoutError(f"'{file}': a tensor expected")
    if tree.numel == prod(shape) and len(tree.shape) <= 1 and tree.shape != ():
        return Tensor.of_stored(tree, shape)
    return Tensor.of_stored(tree)


def _read_groups(
    column: Column, table: FileTable, groups: Sequence[Mapping[str, tuple[int, ...]]]
) -> None:
    tree = table.open("zero/optimizer_state.pt").tree
    options = tree.get("param_groups") if isinstance(tree, dict) else None
    if not isinstance(options, list) or not all(isinstance(group, dict) for group in options):
        raise LayoutError("'zero/optimizer_state.pt' has no 'param_groups'")
    inner = tree.get("optimizer_state_dict")
    for index, group in enumerate(options):
        numbers = group.get("params") if isinstance(inner, dict) else [index]
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < len(groups) for n in numbers
        ):
            raise LayoutError(f"group {index} lists {numbers!r}, there are {len(groups)} of shapes")
        names = [name for n in numbers for name in groups[n]]
        column.groups.append(Group(names, {k: v for k, v in group.items() if k != "params"}))
        if isinstance(inner, dict):
            for number in numbers:
                _add_steps(column, inner.get("state"), number, groups[number])


def _add_steps(column: Column, states: Any, number: int, names: Mapping[str, Any]) -> None:
    """What a state has beside tensors of its parameters: the step."""
    state = states.get(number) if isinstance(states, dict) else None
    for key, value in (state if isinstance(state, dict) else {}).items():
        found: Value | None = number_of(value)
        if isinstance(value, StoredTensor) and value.shape == ():
            found = Tensor.of_stored(value)
        if found is not None:
            for name in names:
                column.states.setdefault(name, {}).setdefault(key, found)
