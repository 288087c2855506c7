"""Lightning's own callbacks at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
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


class Backbone(Head):
    """What Lightning's own callback freezes and unfreezes."""

    @property
    def backbone(self) -> Any:
        return self.blocks


class Epochs(L.Callback):
    """The epochs whose beginning was told."""

    def __init__(self) -> None:
        self.begun: list[int] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun.append(trainer.current_epoch)


def _finetune(root: Path, stage: int, start: str | None, end: int = 12) -> Any:
    L.seed_everything(4 if start is None else 55)
    folder = root / f"backbone{stage}"
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = Epochs()
    callbacks = [BackboneFinetuning(1, lambda epoch: 1.5, verbose=False), epochs, saver]
    run = trainer(root, stage, max_epochs=4, max_steps=end, callbacks=callbacks)
    model = Backbone(dropout=0.2)
    ckpt_path = None if start is None else folder / start
    run.fit(model, loader(24), loader(8), ckpt_path=ckpt_path)
    return model.losses, epochs.begun


def _finetune_in_parts(root: Path, stage: int) -> Any:
    full = _finetune(root, stage, None)
    starts = {4: "step=4.ckpt", 6: "step=6.ckpt"}  # within epoch 1, after its last batch
    resumed = {at: _finetune(root, stage, start) for at, start in starts.items()}
    between = _finetune(root, stage, "step=6.ckpt", 7)  # saves within the epoch after that
    return full, resumed, between, _finetune(root, stage, "step=7-v2.ckpt")


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_callback_has_unfrozen_trains_on_after_a_resume(tmp_path: Path, stage: int) -> None:
    for full, resumed, between, last in on_ranks(_finetune_in_parts, 2, tmp_path, stage):
        assert full[1] == [0, 1, 2, 3]
        assert resumed == {4: (full[0][4:], [2, 3]), 6: (full[0][6:], [2, 3])}
        assert between == (full[0][6:7], [2])
        assert last == (full[0][7:], [3])


class Watching(Model):
    """Has a hook of its own, which a copy must keep."""

    def __init__(self) -> None:
        super().__init__()
        self.head.register_forward_hook(double)


def double(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _run_before(root: Path, stage: int, kind: str) -> Any:
    L.seed_everything(4)
    model = Watching()
    trainer(root, stage).validate(model, loader(8), verbose=False)
    for _ in range(2):  # the second fit is of a model that a first one has averaged
        callbacks = _callbacks(kind)
        run = trainer(root, stage, max_epochs=3, callbacks=callbacks, enable_checkpointing=False)
        run.fit(model, loader(24), loader(8))
    average = _copy_of(callbacks[0])
    assert type(average) is Watching
    assert [*average.head._forward_hooks.values()] == [double]
    kinds = [isinstance(parameter, DTensor) for parameter in average.parameters()]
    return model.losses, whole_weights(model), whole_weights(average), kinds


def _run_before_everywhere(root: Path, kind: str) -> list[Any]:
    return [_run_before(root, stage, kind) for stage in (0, 2, 3)]


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_model_that_was_run_before_can_be_averaged(tmp_path: Path, kind: str) -> None:
    for plain, *sharded in on_ranks(_run_before_everywhere, 2, tmp_path, kind):
        for losses, weights, average, kinds in sharded:
            assert losses == [(i, pytest.approx(loss, rel=1e-5)) for i, loss in plain[0]]
            for found, expected in ((weights, plain[1]), (average, plain[2])):
                for key, value in expected.items():
                    torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
            assert any(kinds)
