"""Accumulation windows: whose gradients wait for a step. What lies in them belongs into a checkpoint.

Under automatic optimization the loop knows. Under manual optimization only the user's code does: so the strategy tells
`Windows` of each backward pass and each step, and the window of an optimizer is open while it has not stepped since.
(What an optimizer has stepped with may lie in `.grad` until the next pass, and belongs to no window.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from zero_ckpt.core.naming import parameter_names
from zero_ckpt.lightning import epochs
from zero_ckpt.zero.accumulated import accumulated_gradients

__all__ = ["Windows"]


class Windows:
    """Of one fit, on one rank."""

    def __init__(self) -> None:
        self._waiting: list[Optimizer] = []

    def after_backward(self, optimizers: Iterable[Optimizer]) -> None:
        """A pass may have given any of `optimizers`, which are all of the run, gradients to step with."""
        self._waiting = list(optimizers)

    def after_step(self, optimizer: Optimizer) -> None:
        self._waiting = [each for each in self._waiting if each is not optimizer]

    def gradients(self, trainer: Any) -> dict[str, torch.Tensor]:
        """Name -> what this rank has accumulated in windows that are open; see `accumulated_gradients`."""
        module = trainer.lightning_module
        names: Mapping[int, str] = parameter_names(module)
        if not module.automatic_optimization:
            names = {each: names[each] for each in map(id, self._parameters()) if each in names}
        elif not epochs.is_in_window(trainer):
            return {}
        return accumulated_gradients([module], names) if names else {}

    def _parameters(self) -> Iterable[torch.Tensor]:
        groups = (group for optimizer in self._waiting for group in optimizer.param_groups)
        return (parameter for group in groups for parameter in group["params"])
