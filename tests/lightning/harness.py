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
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(x) * self.scale
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


class SaveAfterEveryBatch(L.Callback):
    """Saves `<n>.ckpt` after the run's n-th batch."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        batches = trainer.fit_loop.total_batch_idx + 1
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{batches}.ckpt")


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


class Probe(L.Callback):
    """What a run starts training with: whole weights and optimizer state by name, on every rank."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.seen = {
            "weights": whole_weights(pl_module),
            "states": [_whole_state(optimizer, names) for optimizer in trainer.optimizers],
            "options": [
                [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
                for optimizer in trainer.optimizers
            ],
            "rates": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        }


def _whole_state(optimizer: Any, names: dict[int, str]) -> dict[str, Any]:
    inner = getattr(optimizer, "optim", optimizer)
    own = {
        f"{names[id(parameter)]}/{key}": whole(value) if isinstance(value, torch.Tensor) else value
        for parameter, values in inner.state.items()
        for key, value in values.items()
    }
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Equal, tensors bitwise with their dtypes; says where not."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), path
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{index}")
    else:
        assert a == b, path
