"""Under Lightning a save beside the training leaves what a save in it leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from safetensors.torch import load_file

from tests.decoupled.jobs import storage
from tests.lightning.harness import Model, assert_same, loader, on_ranks, trainer, whole_weights
from zero_ckpt import AsyncSave
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import ConfigurationError, SaveError
from zero_ckpt.lightning import ZeroStrategy


def stored(path: str) -> dict[str, Any]:
    """All tensors of a checkpoint, and its objects but for paths and times."""
    with open_checkpoint(path) as checkpoint:
        found: dict[str, Any] = {
            f"{role}/{key}": checkpoint.tensor(role, key)
            for role in ("model", "optim")
            for key in checkpoint.keys(role)
        }
        return found | {"step": checkpoint.objects(weights_only=False)["global_step"]}


def _fit(root: str, stage: int, async_save: Any, **options: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    checkpoint = ModelCheckpoint(
        f"{root}/checkpoints",
        filename="{step}",
        every_n_train_steps=2,
        monitor="train_loss",
        mode="max",
        save_top_k=2,
        save_last=True,
    )
    run = trainer(
        root,
        stage,
        max_steps=8,
        callbacks=[checkpoint, *options.pop("callbacks", [])],
        strategy_options={"async_save": async_save, **options},
    )
    model = Model()
    run.fit(model, loader(), loader(8))
    names = sorted(os.listdir(f"{root}/checkpoints"))
    return {
        "names": names,
        "weights": whole_weights(model),
        "losses": model.losses,
        "stored": {n: stored(f"{root}/checkpoints/{n}") for n in names if n.endswith(".ckpt")},
    }


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_fit_leaves_the_same_checkpoints(tmp_path: Path, stage: int) -> None:
    results = [
        on_ranks(_fit, 2, str(tmp_path / str(async_save)), stage, async_save)[0]
        for async_save in (False, True)
    ]
    assert len(results[1]["stored"]) == 3
    assert_same(*results)


def _averaged(root: str, async_save: bool) -> dict[str, Any]:
    """Callbacks put averaged weights in the place of the model's for each validation."""
    return _fit(root, 0, async_save, callbacks=[EMAWeightAveraging(decay=0.8)])


def test_averaged_weights_are_saved_as_they_were(tmp_path: Path) -> None:
    results = [on_ranks(_averaged, 2, str(tmp_path / str(a)), a)[0] for a in (False, True)]
    assert_same(*results)


def _exchanged(root: str) -> dict[str, Any]:
    """An epoch's end is saved, slowly, and the next begins with averaged weights."""

    def hook(operation: Any) -> None:
        time.sleep(0.3)  # so that nothing is staged when the save returns

    callbacks = [
        StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1),
        ModelCheckpoint(root, filename="{epoch}", save_top_k=-1),
    ]
    options = {"async_save": True}
    run = trainer(root, 3, max_epochs=3, callbacks=callbacks, strategy_options=options)
    strategy: Any = run.strategy
    strategy.engine.storage = storage(hook, "free")
    model = Model()
    run.fit(model, loader(16))
    return whole_weights(model)


def test_weights_that_a_callback_exchanges_are_saved_as_they_were(tmp_path: Path) -> None:
    weights = on_ranks(_exchanged, 2, str(tmp_path))[0]
    with open_checkpoint(tmp_path / "epoch=1.ckpt") as checkpoint:
        assert not torch.equal(checkpoint.tensor("model", "head.weight"), weights["head.weight"])


def _fit_on_a_full_disk(root: str) -> str:
    saves = [0]

    def hook(operation: Any) -> None:
        saves[0] += operation.name == "free"
        if saves[0] >= 2 and operation.name == "finish":
            raise OSError(28, "No space left on device", operation.path)

    run = trainer(
        root,
        2,
        max_steps=6,
        callbacks=[ModelCheckpoint(root, filename="{step}", every_n_train_steps=2, save_top_k=1)],
        strategy_options={"async_save": True},
    )
    strategy: Any = run.strategy
    strategy.engine.storage = storage(hook, "free", "finish")
    with pytest.raises(SaveError) as raised:
        run.fit(Model(), loader())
    return str(raised.value)


def test_a_failed_save_ends_the_fit_and_keeps_what_it_would_have_replaced(tmp_path: Path) -> None:
    first, second = on_ranks(_fit_on_a_full_disk, 2, str(tmp_path))
    assert first == second
    assert "No space left" in first
    assert sorted(os.listdir(tmp_path)) == ["latest", "step=2.ckpt"]
    assert (tmp_path / "latest").read_text().strip() == "step=2.ckpt"


def _save_over_a_link_after_a_failure(root: str) -> None:
    saves = [0]

    def hook(operation: Any) -> None:
        saves[0] += operation.name == "free"
        if saves[0] == 2 and operation.name == "finish":
            raise OSError(28, "No space left on device", operation.path)

    run = trainer(root, 2, max_steps=1, strategy_options={"async_save": True})
    run.fit(Model(), loader())
    strategy: Any = run.strategy
    strategy.engine.storage = storage(hook, "free", "finish")
    run.save_checkpoint(f"{root}/a.ckpt")
    if run.is_global_zero:
        os.symlink("a.ckpt", f"{root}/c.ckpt")
    run.save_checkpoint(f"{root}/b.ckpt")
    with pytest.raises(SaveError, match="No space left"):
        run.save_checkpoint(f"{root}/c.ckpt")
    run.strategy.barrier()
    assert os.path.islink(f"{root}/c.ckpt"), "a save that did not begin has changed something"


def test_a_save_that_raises_an_earlier_failure_touches_nothing(tmp_path: Path) -> None:
    on_ranks(_save_over_a_link_after_a_failure, 2, str(tmp_path))


def _fit_export_and_go_on(root: str) -> tuple[int, dict[str, torch.Tensor]]:
    def make(steps: int) -> L.Trainer:
        last = ModelCheckpoint(root, filename="{step}", every_n_train_steps=2, save_last="link")
        strategy = ZeroStrategy(stage=3, async_save=AsyncSave(check_staging=True))
        return trainer(root, 3, strategy=strategy, max_steps=steps, callbacks=[last])

    model = Model()
    make(4).fit(model, loader())
    trained = whole_weights(model)
    again = make(6)
    again.fit(Model(), loader(), ckpt_path="last")
    again.test(Model(), loader(8), ckpt_path="best", verbose=False)
    return again.global_step, trained


def test_export_links_and_resuming_see_committed_saves(tmp_path: Path) -> None:
    for steps, _ in on_ranks(_fit_export_and_go_on, 2, str(tmp_path)):
        assert steps == 6
    assert (tmp_path / "last.ckpt").resolve().name == "step=6.ckpt"
    Model().load_state_dict(load_file(tmp_path / "fp32" / "model.safetensors"), strict=True)


def test_only_waiting_is_right_under_lightning() -> None:
    with pytest.raises(ConfigurationError, match="when_busy='skip'"):
        ZeroStrategy(async_save=AsyncSave(when_busy="skip"))
