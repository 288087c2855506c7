"""What an optimizer's class keeps beside torch's `state` and `param_groups`: its `state_dict` or hooks add it.

A counter of a look-ahead, the rate of a schedule of its own: only its own `load_state_dict` knows where these belong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves_with_path, tree_map_with_path

from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.parts import part_like

__all__ = ["give_own_state", "own_state"]

_TORCHS = frozenset({"state", "param_groups"})


def own_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The entries of its `state_dict` that torch's optimizers do not have, as references."""
    if not _has_own(optimizer):
        return {}
    return {k: v for k, v in optimizer.state_dict().items() if k not in _TORCHS}


def give_own_state(optimizer: torch.optim.Optimizer, own: Mapping[str, Any]) -> None:
    """Let its own `load_state_dict` take in `own`; state and groups stay what and which objects they are.

    That holds for an optimizer inside, too, as far as it has the same. Tensors lie where the live ones do.
    """
    if not own or not _has_own(optimizer):
        return
    kept = [(each, _shared(each, optimizer)) for each in _with_inner(optimizer)]
    live = optimizer.state_dict()
    places = dict(tree_leaves_with_path({k: live[k] for k in own.keys() & live.keys()}))
    values = tree_map_with_path(lambda path, v: _placed(v, places.get(path)), dict(own))
    optimizer.load_state_dict({**live, "state": {}, **values})
    for each, parts in kept:
        vars(each).update(parts)


def _with_inner(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizer, and those that it is wrapped around."""
    found = [optimizer]
    for each in found:  # which grows meanwhile
        inner = [v for v in vars(each).values() if isinstance(v, torch.optim.Optimizer)]
        found += [v for v in inner if not any(v is known for known in found)]
    return found


def _shared(inner: torch.optim.Optimizer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Which of its state and groups are those of `optimizer`, maybe in a list of its own."""
    mine = {id(group) for group in optimizer.param_groups}
    found = {name: vars(inner)[name] for name in _TORCHS & vars(inner).keys()}
    if inner.state is not optimizer.state:
        found.pop("state", None)
    if not any(id(group) in mine for group in inner.param_groups):
        found.pop("param_groups", None)
    return found


def _placed(value: Any, live: Any) -> Any:
    if isinstance(value, LazyTensor):
        value = value.materialize()
    if not isinstance(value, torch.Tensor) or not isinstance(live, torch.Tensor):
        return value
    if isinstance(live, DTensor) and not isinstance(value, DTensor) and live.shape == value.shape:
        return part_like(value, live)
    return value.to(live.device)


def _has_own(optimizer: torch.optim.Optimizer) -> bool:
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)  # a wrapper may have none
    return type(optimizer).state_dict is not torch.optim.Optimizer.state_dict or bool(hooks)
