"""Stands in for the package `evaluate`, whose `load` fetches a metric's code from the hub.

Only what Accelerate's checkpointing scripts call: `load`, `add_batch` and `compute` of accuracy.
"""

from __future__ import annotations

import torch

__all__ = ["Accuracy", "load"]


class Accuracy:
    """Share of predictions that equal their reference, over the batches since the last `compute`."""

    def __init__(self) -> None:
        self._equal: list[bool] = []

    def add_batch(self, *, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self._equal += (predictions == references).flatten().tolist()

    def compute(self) -> dict[str, float]:
        equal, self._equal = self._equal, []
        return {"accuracy": sum(equal) / len(equal)}


def load(path: str, config: str) -> Accuracy:
    """The metric of GLUE's MRPC, which is all that is asked for."""
    if (path, config) != ("glue", "mrpc"):
        raise ValueError(f"metric {path}/{config}: this stand-in has only glue/mrpc")
    return Accuracy()
