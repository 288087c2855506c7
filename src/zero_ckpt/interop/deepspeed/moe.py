"""Mixture of experts without ZeRO: every expert-parallel rank's optimizer in a file of its own, parameters unnamed.

An optimizer steps the parameters that all ranks have, then, in groups marked `moe`, those of its own experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zero_ckpt.interop.deepspeed.column import Column
from zero_ckpt.interop.deepspeed.experts import count_experts, split_expert
from zero_ckpt.interop.deepspeed.file_table import FileTable
from zero_ckpt.interop.deepspeed.names import Folder
from zero_ckpt.interop.deepspeed.tensors import StoredTensor
from zero_ckpt.interop.deepspeed.unsharded import read_unsharded

__all__ = ["read_experts"]

Shapes = Mapping[str, tuple[int, ...]]


def read_experts(
    table: FileTable, names: Folder, mp: int, module: Mapping[str, StoredTensor]
) -> Column:
    """The column of model-parallel rank `mp`. `module`: its parameters, experts by their global names."""
    ranks = sorted(rank for rank, column in names.expert_optims if column == mp)
    dense = {name: stored.shape for name, stored in module.items() if split_expert(name) is None}
    whole = Column()
    for rank in ranks:
        name = names.expert_optims[rank, mp]
        tree = table.open(name).tree
        optimizer = tree.get("optimizer") if isinstance(tree, dict) else None
        if rank == ranks[0]:
            _merge(whole, read_unsharded(_only(optimizer, experts=False), dense))
        own = _experts_of(module, ranks.index(rank), len(ranks))
        _merge(whole, read_unsharded(_only(optimizer, experts=True), own), after=1)
    return whole


def _merge(whole: Column, part: Column, after: int = 0) -> None:
    whole.problem = whole.problem or part.problem
    whole.masters |= part.masters
    whole.states |= part.states
    for index, group in enumerate(part.groups, after):
        if index < len(whole.groups) and after:
            whole.groups[index].names += group.names
        else:
            whole.groups.append(group)


def _experts_of(module: Mapping[str, StoredTensor], rank: int, ranks: int) -> Shapes:
    """The parameters of one rank's experts, in the order of layers and experts."""
    totals = count_experts(module)
    found = {}
    for name, stored in module.items():
        expert = split_expert(name)
        if expert is not None:
            prefix, number, _ = expert
            per_rank = totals[prefix] // ranks or 1
            if number // per_rank == rank:
                found[name] = stored.shape
    return found


def _only(optimizer: Any, experts: bool) -> Any:
    """The optimizer's state dict with one kind of groups."""
    if not isinstance(optimizer, dict):
        return optimizer
    inner = optimizer.get("optimizer_state_dict")
    if isinstance(inner, dict):
        groups = inner.get("param_groups") or []
        keep = [bool(isinstance(g, dict) and g.get("moe")) == experts for g in groups]
        kept = {**optimizer, "optimizer_state_dict": _only(inner, experts)}
        for name in ("fp32_groups", "fp32_groups_flat"):
            if isinstance(optimizer.get(name), list):
                kept[name] = [m for m, k in zip(optimizer[name], keep, strict=False) if k]
        return kept
    groups = optimizer.get("param_groups")
    if not isinstance(groups, list):
        return optimizer
    return {
        **optimizer,
        "param_groups": [
            g for g in groups if isinstance(g, dict) and bool(g.get("moe")) == experts
        ],
    }
