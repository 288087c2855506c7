"""A run that Lightning made with DeepSpeed goes on under `strategy="zero_ckpt"`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.interop.cases import Case
from tests.interop.models import Frozen
from tests.workers import run_ranks
from zero_ckpt.lightning import ZeroStrategy, load_module


class Module(L.LightningModule):
    def __init__(self, hidden: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Frozen()
        self.register_buffer("ema", torch.zeros(3))
        self.seen: dict[str, Any] = {}

    def on_train_start(self) -> None:
        optimizer: Any = self.optimizers()
        state = {
            k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in self.state_dict().items()
        }
        self.seen = {
            "weights": {key: value.detach().clone() for key, value in state.items()},
            "lr": optimizer.param_groups[0]["lr"],
            "moments": len(getattr(optimizer.optimizer, "optim", optimizer.optimizer).state),
            "step": self.global_step,
            "epoch": self.current_epoch,
        }

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(*batch)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def resume(directory: str, folder: str, stage: int) -> dict[str, Any]:
    os.chdir(folder)
    module = Module()
    trainer = L.Trainer(
        strategy=ZeroStrategy(stage=stage, export=False),
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(24, 13), torch.randn(24, 5))
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=directory)
    return {**module.seen, "steps": trainer.global_step}


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_moments_schedule_and_loops_go_on(
    stage: int, deepspeed_cases: Path, tmp_path: Path
) -> None:
    case = Case(deepspeed_cases / "lightning_z2_w2")
    ranks = run_ranks(resume, 2, str(case.directory), str(tmp_path), stage)
    assert sum(seen["moments"] for seen in ranks) == (3 if stage == 1 else 6)
    for seen in ranks:
        assert (seen["epoch"], seen["step"], seen["steps"]) == (1, 3, 6)
        assert seen["lr"] == pytest.approx(0.01)
        for key, value in case.weights.items():
            assert torch.equal(seen["weights"][key], value), key


def test_the_module_alone_comes_with_its_hyper_parameters(deepspeed_cases: Path) -> None:
    case = Case(deepspeed_cases / "lightning_z2_w2")
    module = load_module(Module, case.directory)
    assert module.hparams["hidden"] == 9
    assert isinstance(module.net, nn.Module)
    for key, value in case.weights.items():
        assert torch.equal(module.state_dict()[key], value)
