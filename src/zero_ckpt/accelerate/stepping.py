"""Accelerate's optimizers at stages 2 and 3: a step that cannot be made on sharded parameters says what to do."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer

from zero_ckpt.zero.stepping import tell_remedy

__all__ = ["tell_when_it_cannot_step"]


class _OptimizerOfShards(AcceleratedOptimizer):  # type: ignore[misc]
    def step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except Exception as error:
            tell_remedy(error, "Attach with stage=1, where each rank updates whole ones.")
            raise


def tell_when_it_cannot_step(prepared: Any) -> None:
    """From now on the step of `prepared` tells the remedy. It stays the same optimizer, of a subclass."""
    if type(prepared) is AcceleratedOptimizer:
        prepared.__class__ = _OptimizerOfShards
