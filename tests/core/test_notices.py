"""Warnings name the line of the user's code, whatever lies between."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import zero_ckpt
from zero_ckpt.accelerate import ZeroAccelerator
from zero_ckpt.lightning import ZeroStrategy


@torch.no_grad()
def load_plainly(directory: str) -> None:
    zero_ckpt.load_checkpoint(directory, nn.Linear(2, 2))


def load_by_accelerate(directory: str) -> None:
    ZeroAccelerator(cpu=True).load_state(directory, missing_ok=True)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def export_in_lightning(directory: str) -> None:
    (Path(directory) / "checkpoints").mkdir()
    (Path(directory) / "checkpoints" / "fp32").write_text("in the way of the folder")
    trainer = L.Trainer(
        strategy=ZeroStrategy(),
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    trainer.fit(Net(), DataLoader(torch.ones(2, 2)))
    dist.destroy_process_group()  # Lightning leaves it to the end of the process


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
@pytest.mark.parametrize("call", [load_plainly, load_by_accelerate, export_in_lightning])
def test_a_warning_names_the_line_that_the_user_wrote(call: object, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="NOTHING WAS LOADED|the fp32 export failed") as caught:
        call(str(tmp_path))  # type: ignore[operator]
    ours = [w for w in caught if "LOADED" in str(w.message) or "export" in str(w.message)]
    assert [w.filename for w in ours] == [__file__]
