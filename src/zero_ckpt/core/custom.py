"""Loading weights by a function of the user's, which gets the stored weights lazily, and the module.

Every stored byte of weights is verified before the function is called, by all ranks in shares, so that it meets no
damage half-way. What it raises is raised on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.control import ControlPlane
from zero_ckpt.core.naming import dotted, innermost, local_name
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.shares import verify_share
from zero_ckpt.core.state import capture_model

__all__ = ["CustomLoad", "lazy_state_dict", "plan_custom"]

CustomLoad = Callable[[dict[str, Any], nn.Module], Any]
"""`load(src, dst)`. `src`: the stored weights, as `lazy_state_dict` gives them; where experts live on different ranks,
those of this rank, by the numbers that they have here. `dst`: the module, without the wrappers around it.

A sharded parameter may be filled as if it were whole (`dst.load_state_dict(src)`, `parameter.copy_(src[name])`): when a
lazy tensor meets a DTensor, each rank reads its own part.
"""


def lazy_state_dict(
    checkpoint: Checkpoint, extra: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Stored weights and `extra` state whose names begin with `prefix`, without it: tensors that read when used.

    A tied name stands for the same lazy tensor as the first name.
    """
    weights: dict[str, Any] = {
        key: checkpoint.lazy("model", key)
        for key in checkpoint.keys("model")
        if key.startswith(prefix)
    }
    for alias, key in checkpoint.manifest.aliases.items():
        if key in weights and alias.startswith(prefix):
            weights[alias] = weights[key]
    weights |= {key: value for key, value in extra.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def plan_custom(
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module],
    extra: Mapping[str, Any],
    load: CustomLoad,
    control: ControlPlane,
) -> Restoration:
    """Let `load` fill each model. Raises `CorruptShardError` for damage in this rank's share of the weights."""
    verify_share(checkpoint, ("model",), control, None)
    plan = Restoration()
    for name, model in models.items():
        state = capture_model(model)  # lets sharded models put away what they have gathered
        every = lazy_state_dict(checkpoint, extra, dotted(name))
        called = {key: local_name(key, state.experts) for key in every}
        source = {here: every[key] for key, here in called.items() if here is not None}
        plan.installs.append(partial(load, source, innermost(model)))
    return plan
