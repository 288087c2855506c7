"""When fit ends the best weights lie beside the checkpoints as one fp32 file, unless they should not."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from safetensors.torch import load_file

from tests.lightning.harness import Model, assert_same, loader, on_ranks, trainer, whole_weights
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32 import get_fp32_state_dict_from_zero_checkpoint
from zero_ckpt.lightning import Fp32Export, ZeroCheckpointIO, ZeroStrategy


class Worsens(Model):
    """Its validation loss is best after the first epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch), sync_dist=True)


def fit(root: Path, stage: int, model: Model, export: Any = True, **options: Any) -> Any:
    """Train two epochs; returns the weights at the end and the paths of the best and the last checkpoint."""
    L.seed_everything(1, verbose=False)
    run = trainer(root, stage, strategy=ZeroStrategy(stage, export=export), max_epochs=2, **options)
    run.fit(model, loader(16), loader(8))
    saved = run.checkpoint_callbacks
    best = saved[0].best_model_path if saved else ""
    return whole_weights(model), best


def best_checkpoint(root: Path, stage: int) -> None:
    keeper = ModelCheckpoint(root / "checkpoints", monitor="val_loss", save_last=True)
    weights, best = fit(root, stage, Worsens(), callbacks=[keeper])
    exported = load_file(root / "checkpoints" / "fp32" / "model.safetensors")
    assert Path(best).name == "epoch=0-step=2.ckpt"
    assert_same(exported, dict(get_fp32_state_dict_from_zero_checkpoint(best)))
    assert not torch.equal(exported["head.weight"], weights["head.weight"])
    Model().load_state_dict(exported, strict=True)
    assert sorted(os.listdir(root / "checkpoints")) == [
        "epoch=0-step=2.ckpt",
        "fp32",
        "last.ckpt",
        "latest",
    ]


@pytest.mark.parametrize("stage", [1, 3])
def test_the_best_checkpoint_is_exported_beside_it(tmp_path: Path, stage: int) -> None:
    on_ranks(best_checkpoint, 2, tmp_path, stage)


def last_checkpoint(root: Path) -> None:
    keeper = ModelCheckpoint(root / "checkpoints")
    model = Model(lr=0.02)
    weights, _ = fit(root, 2, model, Fp32Export(format="ckpt"), callbacks=[keeper])
    path = root / "checkpoints" / "fp32" / "model.ckpt"
    loaded = Model.load_from_checkpoint(path)
    assert_same(whole_weights(loaded), weights)
    assert loaded.hparams["lr"] == 0.02
    again = torch.load(path, weights_only=True)
    assert again["epoch"] == 1
    assert "optimizer_states" not in again


def test_without_a_monitor_it_is_the_last_checkpoint_and_lightning_can_load_it(
    tmp_path: Path,
) -> None:
    on_ranks(last_checkpoint, 2, tmp_path)


class Average(L.Callback):
    """Changes the weights when training ends, as weight averaging does."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.5)


class ChangesItself(Model):
    def on_train_end(self) -> None:
        with torch.no_grad():
            self.scale.add_(1000)


def live_weights(root: Path) -> None:
    options: dict[str, Any] = {"callbacks": [Average()], "enable_checkpointing": False}
    weights, _ = fit(root, 3, ChangesItself(), Fp32Export(), **options)
    exported = load_file(root / "fp32" / "model.safetensors")
    assert_same(exported, weights)
    assert (exported["scale"] > 900).all(), "the module's on_train_end came before"
    assert os.listdir(root / "fp32") == ["model.safetensors"]


def test_live_weights_are_exported_after_every_other_hook_when_nothing_was_saved(
    tmp_path: Path,
) -> None:
    on_ranks(live_weights, 2, tmp_path)


def cannot_write(root: Path) -> list[str]:
    target = root / "file"
    target.touch()
    keeper = ModelCheckpoint(root / "checkpoints")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(root, 2, Model(), Fp32Export(dirpath=target / "out"), callbacks=[keeper])
    return [str(w.message) for w in caught if "fp32" in str(w.message)]


def test_a_failed_export_is_a_warning_and_training_ends_well(tmp_path: Path) -> None:
    told, quiet = on_ranks(cannot_write, 2, tmp_path)
    assert quiet == []
    assert len(told) == 1
    assert "the fp32 export failed; training and checkpoints are not affected" in told[0]
    assert "NotADirectoryError" in told[0]


class Tells(Fp32Export):  # type: ignore[misc,valid-type]
    """Keeps what it tells."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def _say(self, text: str) -> None:
        self.told.append(text)


def moved_over(root: Path) -> list[str]:
    def keeper() -> dict[str, Any]:
        return {"callbacks": [ModelCheckpoint(root / "old", monitor="val_loss")]}

    first = trainer(root, 0, strategy="ddp", max_epochs=1, **keeper())
    first.fit(Worsens(), loader(16), loader(8))
    old = first.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    export = Tells()
    run = trainer(root, 2, strategy=ZeroStrategy(2, export=export), max_epochs=2, **keeper())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Worsens(), loader(16), loader(8), ckpt_path=old)
    assert run.checkpoint_callback.best_model_path == old  # type: ignore[union-attr]
    assert not (root / "old" / "fp32").exists()
    [told] = export.told
    assert told.startswith(f"no fp32 export: the best checkpoint is {old}, a file from before")
    return [str(w.message) for w in caught if "fp32" in str(w.message)]


def test_a_best_checkpoint_that_is_a_file_from_before_is_left_and_told(tmp_path: Path) -> None:
    assert on_ranks(moved_over, 2, tmp_path) == [[], []]


class Fails(Model):
    def on_train_epoch_end(self) -> None:
        raise RuntimeError("as a test")


def no_export(root: Path) -> None:
    keeper = {"callbacks": [ModelCheckpoint(root / "checkpoints", every_n_train_steps=1)]}
    with pytest.raises(RuntimeError, match="as a test"):
        fit(root, 2, Fails(), **keeper)
    fit(root, 2, Model(), fast_dev_run=True)
    fit(root / "off", 2, Model(), export=False)
    fit(root / "quiet", 2, Model(), enable_checkpointing=False)
    bare = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=ZeroStrategy(2, export=Fp32Export(root / "bare" / "fp32")),
        barebones=True,
        max_epochs=1,
        default_root_dir=root,
    )
    bare.fit(Model(), loader(16))
    assert not list(root.rglob("fp32"))


def test_nothing_is_exported_after_an_exception_nor_by_a_trainer_that_keeps_nothing(
    tmp_path: Path,
) -> None:
    on_ranks(no_export, 1, tmp_path)


def tuned(root: Path) -> None:
    """A search for the learning rate is no fit: the trainer is what it was, and nothing is exported."""
    run = trainer(root, 2, strategy=ZeroStrategy(2), max_epochs=1, enable_checkpointing=True)
    before = list(run.callbacks)
    Tuner(run).lr_find(Searching(), loader(), num_training=4)
    assert run.callbacks == before
    assert not list(root.rglob("fp32"))
    run.fit(Searching(), loader(16))
    assert run.callbacks == before
    assert len(list(root.rglob("model.safetensors"))) == 1
    run.fit_loop.max_epochs = 2
    with pytest.raises(RuntimeError, match="as a test"):
        run.fit(Fails(), loader(16))
    assert run.callbacks == before


class Searching(Model):
    lr = 0.05


def test_a_trainer_keeps_its_own_callbacks(tmp_path: Path) -> None:
    on_ranks(tuned, 2, tmp_path)


def nothing_left(root: Path) -> None:
    keeper = ModelCheckpoint(root / "checkpoints")
    weights, best = fit(root, 2, Model(), export=False, callbacks=[keeper])
    assert not (root / "checkpoints" / "fp32").exists()
    again = trainer(root, 2, strategy=ZeroStrategy(2), max_epochs=2, callbacks=[keeper])
    again.fit(Model(), loader(16), loader(8), ckpt_path=best)
    assert_same(load_file(root / "checkpoints" / "fp32" / "model.safetensors"), weights)


def test_a_run_that_was_killed_in_its_export_makes_it_when_it_is_resumed(tmp_path: Path) -> None:
    on_ranks(nothing_left, 1, tmp_path)


def plain_strategy(root: Path) -> None:
    run = trainer(
        root,
        0,
        strategy="auto",
        devices=1,
        plugins=[ZeroCheckpointIO()],
        max_epochs=1,
        callbacks=[
            Fp32Export(strip_prefix="blocks.", dtype="bf16"),
            ModelCheckpoint(root / "checkpoints"),
        ],
    )
    model = Model()
    run.fit(model, loader(16), loader(8))
    exported = load_file(root / "checkpoints" / "fp32" / "model.safetensors")
    weight = model.blocks[0].lower.weight.detach().cpu()
    assert torch.equal(exported["0.lower.weight"], weight.bfloat16())


def test_the_callback_works_with_lightnings_own_strategies(tmp_path: Path) -> None:
    on_ranks(plain_strategy, 1, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"format": "onnx"}, {"dtype": "fp8"}, {"max_shard_size": "5XB"}, {"dirpath": "weights.h5"}],
)
def test_options_that_cannot_work_are_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Fp32Export(**wrong)
