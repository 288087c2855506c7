"""Mixture of experts: which ranks hold which experts, and the global names of their parameters. Pure.

Expert-parallel rank e holds the experts e*n .. e*n + n - 1 of a layer, and names them 0 .. n - 1. Ranks that hold the
same experts partition their optimizer state among each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from zero_ckpt.interop.deepspeed.tensors import LayoutError

__all__ = ["count_experts", "global_name", "ranks_of_experts", "split_expert"]

_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)", re.DOTALL)


def split_expert(name: str) -> tuple[str, int, str] | None:
    """(prefix of the layer's experts, expert's number, what follows) of an expert's parameter; None for any other."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def count_experts(names: Iterable[str]) -> dict[str, int]:
    """Prefix of a layer's experts -> how many of them the parameters of these names belong to."""
    found: dict[str, set[int]] = {}
    for name in names:
        if (expert := split_expert(name)) is not None:
            prefix, number, _ = expert
            found.setdefault(prefix, set()).add(number)
    return {prefix: len(numbers) for prefix, numbers in found.items()}


def global_name(name: str, expert_rank: int, counts: Mapping[str, int]) -> str:
    """The name of a parameter of expert-parallel rank `expert_rank`, with the expert's global number.

    `counts`: how many experts of each layer a rank has.
    """
    expert = split_expert(name)
    if expert is None:
        if expert_rank:
            raise LayoutError(
                f"'{name}' lies in a group of experts and is not named 'deepspeed_experts.<number>'"
            )
        return name
    prefix, number, rest = expert
    return f"{prefix}{expert_rank * counts[prefix] + number}{rest}"


def ranks_of_experts(
    world: int, parts: int, orders: Sequence[Any]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(expert-parallel rank, the data-parallel ranks that hold its experts, in the order of their partitions).

    `parts`: how many ranks share the same experts. `orders[rank]`: equal for ranks with the same slice of theirs. By
    default consecutive ranks form an expert-parallel group; with `use_data_before_expert_parallelism` every
    `parts`-th one does. The slices tell which.
    """
    size = world // parts
    usual = [tuple(e + i * size for i in range(parts)) for e in range(size)]
    other = [tuple(e * parts + i for i in range(parts)) for e in range(size)]
    chosen = usual
    if not _same_slices(usual, orders) and _same_slices(other, orders):
        chosen = other
    return iter(enumerate(chosen))


def _same_slices(ranks: Sequence[tuple[int, ...]], orders: Sequence[Any]) -> bool:
    """Whether the i-th ranks of all experts hold the same slice, and of one expert all hold different ones."""
    first = [orders[rank] for rank in ranks[0]]
    alike = all([orders[rank] for rank in row] == first for row in ranks)
    return alike and all(a != b for i, a in enumerate(first) for b in first[:i])
