"""The example's data: an ordinary `Dataset` and an ordinary shuffling `DataLoader`.

Lightning gives each rank its share, and zero_ckpt continues them in the middle of an epoch.
"""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader

from shared.text import training_windows


class StandardLibrary(L.LightningDataModule):
    """Windows of `context` bytes, `batch_size` of them per step and rank."""

    def __init__(self, batch_size: int = 8, context: int = 128) -> None:
        super().__init__()
        self.batch_size, self.context = batch_size, context

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(training_windows(self.context), self.batch_size, shuffle=True)
