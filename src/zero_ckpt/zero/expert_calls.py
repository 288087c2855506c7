"""Checks that no expert is left out of a forward pass where several ranks gather experts together.

Ranks that have the same experts gather and reduce each of them in the order in which they are called. A rank that
skips one, because no token chose it, would take the next one's values for it: silently, since experts are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero.experts import mesh_of_experts

__all__ = ["require_every_call"]


def require_every_call(root: nn.Module, lists: Mapping[str, nn.ModuleList]) -> None:
    """From now on a forward pass of `root` ends with an error when it has called some experts of a list and not all.

    `lists`: of experts, by their paths. Experts that no other rank has may be called or left out freely.
    """
    eager: Any = torch.compiler.disable  # untyped in torch
    calls: dict[str, list[int]] = {}
    for path, experts in lists.items():
        if mesh_of_experts(experts).replicas.size() > 1:
            calls[path] = [0] * len(experts)
            for index, expert in enumerate(experts):
                expert.register_forward_pre_hook(eager(_counting(calls[path], index)))
    if calls:
        root.register_forward_hook(eager(lambda *_: _check(calls)))


def _counting(counts: list[int], index: int) -> Any:
    def count(*_: Any) -> None:
        counts[index] += 1

    return count


def _check(calls: Mapping[str, list[int]]) -> None:
    for path, counts in calls.items():
        missed = [index for index, count in enumerate(counts) if count < max(counts)]
        counts[:] = [0] * len(counts)
        if missed:
            raise ConfigurationError(
                f"a forward pass has called experts of '{path}' and left out this rank's numbers {missed}. Sharded "
                "experts must all be called: with an empty input when they got no token."
            )
