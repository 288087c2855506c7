"""Tensors whose names differ little, as one line: `blocks.{0..31}.mlp.weight/{exp_avg,exp_avg_sq}`. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["Group", "group_names"]

_NUMBER = re.compile(r"(?:(?<=[./])|^)(0|[1-9]\d*)(?=[./]|$)")


@dataclass(frozen=True, slots=True)
class Group:
    """`name` stands for all `keys`."""

    name: str
    keys: tuple[str, ...]


def group_names(keys: Iterable[str], kind: Callable[[str], Hashable]) -> list[Group]:
    """Groups of keys of one `kind` whose names differ only in numbers between dots or slashes, or in the last part.

    The last part is what follows the last slash. Groups are in the order in which their first keys appear.
    """
    found: dict[Hashable, list[str]] = {}
    for key in keys:
        text = tuple(_NUMBER.split(key)[::2])
        found.setdefault((text, kind(key)), []).append(key)
    groups = [Group(_common_name(members), tuple(members)) for members in found.values()]
    return _merge_endings(groups, kind)


def _merge_endings(groups: Sequence[Group], kind: Callable[[str], Hashable]) -> list[Group]:
    """Groups of the same parameters: optimizer states are named `<parameter>/<state>`."""
    found: dict[Hashable, list[Group]] = {}
    for group in groups:
        parameter, slash, name = group.name.rpartition("/")
        base = parameter + slash or name
        found.setdefault((base, len(group.keys), kind(group.keys[0])), []).append(group)
    return [_merged(members) for members in found.values()]


def _merged(groups: Sequence[Group]) -> Group:
    if len(groups) == 1:
        return groups[0]
    parameter = groups[0].name.rpartition("/")[0]
    endings = ",".join(group.name.rpartition("/")[2] for group in groups)
    return Group(f"{parameter}/{{{endings}}}", tuple(key for group in groups for key in group.keys))


def _common_name(keys: Sequence[str]) -> str:
    if len(keys) == 1:
        return keys[0]
    parts = [_NUMBER.split(key) for key in keys]
    values = [sorted({int(part[i]) for part in parts}) for i in range(1, len(parts[0]), 2)]
    is_grid = prod(len(numbers) for numbers in values) == len(keys)
    name = parts[0][0]
    for numbers, text in zip(values, parts[0][2::2], strict=True):
        name += _range(numbers, is_grid) + text
    return name


def _range(numbers: Sequence[int], is_grid: bool) -> str:
    """The numbers as `{0..31}` or `{1,3}`; `*` where that would promise keys that are not there."""
    if len(numbers) == 1:
        return str(numbers[0])
    if is_grid and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    if is_grid and len(numbers) <= 4:
        return f"{{{','.join(map(str, numbers))}}}"
    return "*"
