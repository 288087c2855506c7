"""Lightning's own callbacks at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.distributed.tensor import DTensor

from tests.lightning.harness import (
    Model,
    assert_same,
    loader,
    on_ranks,
    trainer,
    whole_weights,
)

STAGES = (0, 1, 2, 3)


class Unfreeze(BaseFinetuning):
    """Trains the head first, then adds the blocks as a group of their own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.blocks, optimizer, lr=0.01)
        elif epoch > 1:
            self.make_trainable(pl_module.blocks)  # a resumed run has frozen them again


class Head(Model):
    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _callbacks(kind: str) -> list[Any]:
    return {
        "average": lambda: [WeightAveraging()],
        "ema": lambda: [EMAWeightAveraging(decay=0.8)],
        "swa": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
        "finetuning": lambda: [Unfreeze()],
    }[kind]()


def _copy_of(callback: Any) -> Any:
    copy = getattr(callback, "_average_model", None)
    return getattr(copy, "module", copy)


def _fit(root: Path, stage: int, kind: str, ckpt_path: str | None) -> Any:
    L.seed_everything(4 if ckpt_path is None else 55)
    model = Head() if kind == "finetuning" else Model(dropout=0.2)
    callbacks = _callbacks(kind)
    saver = ModelCheckpoint(
        dirpath=root / f"{kind}{stage}",
        filename="{epoch}",
        save_top_k=-1,
        enable_version_counter=False,
    )
    run = trainer(root, stage, max_epochs=4, callbacks=[*callbacks, saver])
    run.fit(model, loader(24), loader(8), ckpt_path=ckpt_path)
    copy = _copy_of(callbacks[0])
    parts = [] if copy is None else [isinstance(p, DTensor) for p in copy.parameters()]
    return model.losses, whole_weights(model), parts


def _fit_and_resume(root: Path, kind: str) -> list[Any]:
    return [
        (
            _fit(root, stage, kind, None),
            _fit(root, stage, kind, str(root / f"{kind}{stage}" / "epoch=1.ckpt")),
        )
        for stage in STAGES
    ]


@pytest.mark.parametrize("kind", ["average", "ema", "swa", "finetuning"])
def test_callback_works_and_resumes_at_every_stage(tmp_path: Path, kind: str) -> None:
    for results in on_ranks(_fit_and_resume, 2, tmp_path, kind, timeout=150):
        expected = results[0][0]
        for stage, (full, resumed) in zip(STAGES, results, strict=True):
            assert full[0] == [(i, pytest.approx(loss, rel=1e-5)) for i, loss in expected[0]]
            for key, value in expected[1].items():
                torch.testing.assert_close(full[1][key], value)
            assert resumed[0] == full[0][6:]  # two epochs of three steps
            assert_same(resumed[1], full[1])
            assert all(full[2]) == (stage >= 2) or not full[2]
