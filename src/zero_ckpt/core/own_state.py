"""What an optimizer's class keeps beside torch's `state` and `param_groups`: its `state_dict` or hooks add it.

A counter of a look-ahead, the rate of a schedule of its own: only its own `load_state_dict` knows where these belong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from zero_ckpt.core.lazy import LazyTensor

__all__ = ["give_own_state", "own_state"]

_TORCHS = frozenset({"state", "param_groups"})


def own_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The entries of its `state_dict` that torch's optimizers do not have, as references."""
    if not _has_own(optimizer):
        return {}
    return {k: v for k, v in optimizer.state_dict().items() if k not in _TORCHS}


def give_own_state(optimizer: torch.optim.Optimizer, own: Mapping[str, Any]) -> None:
    """Let its own `load_state_dict` take in `own`; state and groups stay what and which objects they are."""
    if not own or not _has_own(optimizer):
        return
    kept = {name: vars(optimizer)[name] for name in _TORCHS & vars(optimizer).keys()}
    values = tree_map_only(LazyTensor, LazyTensor.materialize, dict(own))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}, **values})
    vars(optimizer).update(kept)


def _has_own(optimizer: torch.optim.Optimizer) -> bool:
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)  # a wrapper may have none
    return type(optimizer).state_dict is not torch.optim.Optimizer.state_dict or bool(hooks)
