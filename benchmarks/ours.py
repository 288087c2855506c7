"""The one place that names zero_ckpt's API: the rest of the suite calls these functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import zero_ckpt

TAG = "global_step100"
STEP = 100


class Ours:
    """One Checkpointer for all saves and loads of a rank."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._checkpointer = zero_ckpt.Checkpointer(model, optimizer)

    def save(self, directory: Path) -> None:
        """Collective; durable when it returns."""
        self._checkpointer.save_checkpoint(str(directory), tag=TAG, step=STEP)

    def load(self, directory: Path) -> None:
        """Collective; every byte is verified before the first live one changes."""
        self._checkpointer.load_checkpoint(str(directory), tag=TAG)

    def load_once(self, directory: Path) -> None:
        """Collective; every byte is verified just before it is copied."""
        self._checkpointer.load_checkpoint(str(directory), tag=TAG, verify_first=False)


class OursAsync:
    """A Checkpointer that saves beside the training."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._checkpointer = zero_ckpt.Checkpointer(model, optimizer, engine="async")

    def save(self, directory: Path) -> tuple[Callable[[], object], Callable[[], object]]:
        """Collective. What returns when the state may change, and what when the save is committed."""
        handle = self._checkpointer.save_checkpoint(str(directory), tag=TAG, step=STEP)
        return handle.staged, handle.wait

    def staging_seconds(self, directory: Path) -> float:
        """Collective; saves with nothing beside it. Until all of this rank's state was copied and hashed."""
        handle = self._checkpointer.save_checkpoint(str(directory), tag=TAG, step=STEP)
        handle.wait()
        return handle.timings["stage"]

    def close(self) -> None:
        self._checkpointer.close()


def collapse(directory: Path, output: Path) -> None:
    """One process, offline: the checkpoint in `directory` into one durable fp32 file."""
    zero_ckpt.export_fp32(str(directory / TAG), str(output))
