"""State of objects that are registered for checkpointing, on its way back to them.

A sharded tensor in such a state (averaged weights of a sharded model) is stored by all ranks together and comes back
whole and lazily. An object that holds sharded tensors gets it sharded, as its own `state_dict` shows it now.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.parts import part_like

__all__ = ["as_live"]


def as_live(saved: Any, live: Any) -> Any:
    """`saved` with its lazy tensors read, and sharded where `live`, the object's present state, has sharded ones.

    Every rank reads whole tensors, one at a time, and keeps its part. No communication.
    """
    if isinstance(saved, LazyTensor):
        whole = saved.materialize()
        if isinstance(live, DTensor) and live.shape == whole.shape:
            return part_like(whole, live)
        return whole
    if isinstance(saved, dict):
        known = live if isinstance(live, dict) else {}
        for key, value in saved.items():
            saved[key] = as_live(value, known.get(key))
        return saved
    if type(saved) in (list, tuple):
        others = list(live) if isinstance(live, (list, tuple)) else []
        others += [None] * (len(saved) - len(others))
        return type(saved)(as_live(v, o) for v, o in zip(saved, others, strict=False))
    return saved
