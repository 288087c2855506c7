"""What one model-parallel rank's files hold, once the partitions of its data-parallel ranks are put together.

A model-parallel rank (one place of the tensor-parallel and pipeline grid) is a column here: its data-parallel ranks
partition the same parameters among each other. Readers of the ZeRO stages make columns; `grid` joins them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zero_ckpt.interop.deepspeed.records import Record
from zero_ckpt.interop.deepspeed.tensors import LayoutError, StoredTensor, Tensor

__all__ = [
    "Column",
    "Group",
    "Value",
    "extra_states",
    "named_shapes",
    "number_of",
    "shapes_by_group",
    "stored_items",
    "zero_options",
]

Value = Tensor | float
"""A parameter's part of the optimizer state: a tensor, or a number that a whole group shares."""


@dataclass(slots=True)
class Group:
    """A parameter group: names in the optimizer's order, and its options."""

    names: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Column:
    """What one model-parallel rank holds, by names of parameters.

    `masters`: the weights that the optimizer steps with. `module`: tensors of the module's own state dict, where they
    are whole. `states`: parameter -> name -> value. `order`: names as the module lists them. `aliases`: tied name ->
    the name that is stored. `problem`: why there is no optimizer state; "" when there is.
    """

    masters: dict[str, Tensor] = field(default_factory=dict)
    module: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, dict[str, Value]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    buffers: set[str] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def named_shapes(found: Any, what: str) -> dict[str, tuple[int, ...]]:
    """A mapping of names to shapes, checked. Raises `LayoutError`."""
    if not isinstance(found, dict):
        raise LayoutError(f"{what}: names and shapes expected, a {type(found).__name__} found")
    for name, shape in found.items():
        sound = isinstance(name, str) and isinstance(shape, (tuple, list))
        if not sound or not all(type(n) is int and n >= 0 for n in shape):
            raise LayoutError(f"{what}: '{name}': a shape expected, {shape!r} found")
    return {name: tuple(shape) for name, shape in found.items()}


def shapes_by_group(model: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """`param_shapes` of a model file: one mapping for each group, in the order in which the group is laid out."""
    found = model.get("param_shapes")
    groups = found if isinstance(found, list) else [found]
    return [named_shapes(group, f"param_shapes[{i}]") for i, group in enumerate(groups)]


def zero_options(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """`zero_optimization` of the configuration that the model file holds."""
    config = model.get("ds_config")
    found = config.get("zero_optimization") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def number_of(value: Any) -> float | None:
    """A Python number, or None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


EXTRA_STATE = "_extra_state"
"""The last part of the name under which a module keeps what its `get_extra_state` returned."""


def stored_items(found: Any) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a state dict. Raises `LayoutError` for what is neither a tensor nor a module's extra state."""
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(name, str) and name.rpartition(".")[2] == EXTRA_STATE:
            continue
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            kind = value.kind.path if isinstance(value, Record) else type(value).__name__
            raise LayoutError(f"'{name}': a tensor expected, '{kind}' found")
        yield name, value


def extra_states(found: Any) -> dict[str, Any]:
    """What modules' `get_extra_state` returned, from a state dict."""
    items = found.items() if isinstance(found, dict) else ()
    return {
        name: value
        for name, value in items
        if isinstance(name, str) and name.rpartition(".")[2] == EXTRA_STATE
    }
