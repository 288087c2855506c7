"""Resuming: bitwise as if never interrupted, at the same world size and stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.lightning.harness import Model, loader, on_ranks, trainer, whole_weights

STEPS = 14  # epochs have 6 steps on 2 ranks


def _run(root: Path, stage: int, ckpt_path: str | None, **options: Any) -> tuple[Any, ...]:
    L.seed_everything(7 if ckpt_path is None else 1234)  # a resumed run must not depend on its seed
    model = Model(dropout=0.4)
    saver = ModelCheckpoint(
        dirpath=root / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    run = trainer(root, stage, max_steps=STEPS, callbacks=[saver], **options)
    run.fit(model, loader(shuffle=True), loader(8), ckpt_path=ckpt_path)
    return model.losses, whole_weights(model), torch.rand(2)


def _compare(full: list[Any], resumed: list[Any], step: int) -> None:
    for (losses, weights, draw), (new_losses, new_weights, new_draw) in zip(
        full, resumed, strict=True
    ):
        assert new_losses == losses[step:]
        assert torch.equal(draw, new_draw)
        for key, value in weights.items():
            assert torch.equal(value, new_weights[key]), key


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_within_an_epoch_is_bitwise_as_if_never_interrupted(
    tmp_path: Path, stage: int
) -> None:
    full = on_ranks(_run, 2, tmp_path, stage, None)
    for step in (4, 6, 9):
        path = str(tmp_path / "checkpoints" / f"step={step}.ckpt")
        _compare(full, on_ranks(_run, 2, tmp_path / "again", stage, path), step)
