"""The example's LightningModule: how to train the plain `GPT`.

It knows nothing about ZeRO or checkpoints: a module needs no change to be sharded.
"""

from __future__ import annotations

import math

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from shared.gpt import GPT, loss_of


class LitGPT(L.LightningModule):
    """Trains a `GPT` with AdamW; the learning rate warms up, then falls along a cosine."""

    def __init__(self, learning_rate: float = 3e-3, warmup_steps: int = 20) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gpt = GPT()

    def training_step(self, windows: torch.Tensor, batch_index: int) -> torch.Tensor:
        loss = loss_of(self.gpt, windows)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.learning_rate, betas=(0.9, 0.95)
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def learning_rate_factor(self, step: int) -> float:
        warm = (step + 1) / self.hparams.warmup_steps
        done = min(step / self.trainer.max_steps, 1.0)
        return min(warm, 0.55 + 0.45 * math.cos(math.pi * done))
