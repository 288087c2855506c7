"""The module and the optimizer inside what Fabric, Lightning and Accelerate hand to their users in place of them.

Such a wrapper names the module's tensors after itself, calls its optimizer by another class, and keeps no state of its
own: a checkpoint holds what is inside, so that it opens without the framework. Known by their classes' names, so that
no framework is imported.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from zero_ckpt.core.naming import innermost

__all__ = ["unwrapped_model", "unwrapped_optimizer"]

_PACKAGES = {"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"}
_OPTIMIZERS = {"_FabricOptimizer", "AcceleratedOptimizer", "LightningOptimizer"}


def unwrapped_model(model: Any) -> Any:
    """What `Fabric.setup` was given, also where its module was compiled afterwards; any other model as it is."""
    inside = innermost(model) if isinstance(model, nn.Module) else model
    return unwrapped_model(inside.module) if _is(inside, {"_FabricModule"}) else model


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer that a framework's wrapper steps; any other one as it is."""
    while _is(optimizer, _OPTIMIZERS):
        optimizer = optimizer.optimizer
    return optimizer


def _is(value: Any, names: set[str]) -> bool:
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] in _PACKAGES
        for kind in type(value).__mro__
    )
