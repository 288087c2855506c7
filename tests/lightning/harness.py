"""Trainers and small models for tests that run Lightning on real ranks.

Inside of `run_ranks` the process group and the variables of a launch exist already; Lightning uses
both, so that a trainer is an ordinary one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.workers import run_ranks
from zero_ckpt.lightning import ZeroStrategy

FEATURES = 6


class Block(nn.Module):
    """Repeated, so that it becomes a unit."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lower = nn.Linear(FEATURES, 8)
        self.upper = nn.Linear(8, FEATURES)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.upper(self.dropout(torch.tanh(self.lower(x))))


class Model(L.LightningModule):
    """Blocks, a batch norm (buffers), a parameter of its own, and a list of its losses."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(2)])
        self.norm = nn.BatchNorm1d(FEATURES, momentum=0.3)
        self.head = nn.Linear(FEATURES, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.losses: list[tuple[int, float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(self.norm(x)) * self.scale
        return result

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append((self.global_step, loss.item()))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        result: torch.Tensor = self(batch[0])
        return result

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7),
                "interval": "step",
            },
        }


def loader(
    rows: int = 48, *, shuffle: bool = False, batch_size: int = 4, seed: int = 0
) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3] * 2 - 1), batch_size=batch_size, shuffle=shuffle)


def trainer(root: str | Path, stage: int, **options: Any) -> L.Trainer:
    """A quiet trainer on all ranks of the process group. `strategy_options`: of the strategy."""
    strategy = options.pop("strategy", None)
    given = options.pop("strategy_options", {})
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": dist.get_world_size(),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": "callbacks" in options,
        "default_root_dir": str(root),
        "strategy": strategy or ZeroStrategy(stage=stage, export=False, **given),
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**defaults, **options})


def whole_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, whole, on every rank. Collective."""
    return {key: whole(value).clone() for key, value in module.state_dict().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach()


def on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90) -> list[Any]:
    """`run_ranks` with Lightning's advice to users switched off."""
    return run_ranks(_quietly, world_size, fn, args, timeout=timeout)


def _quietly(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning)(\.|$)")
    return fn(*args)
