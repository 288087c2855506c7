"""Resuming: bitwise as if never interrupted, at the same world size and stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.lightning.harness import (
    FEATURES,
    Model,
    SaveAfterEveryBatch,
    assert_same,
    loader,
    on_ranks,
    trainer,
    whole_weights,
)
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.lightning.pending_rng import PendingRng
from zero_ckpt.lightning.ranks import Resumption

STEPS = 14  # epochs have 6 steps on 2 ranks


def _run(root: Path, stage: int, ckpt_path: str | None) -> tuple[Any, ...]:
    L.seed_everything(7 if ckpt_path is None else 1234)  # a resumed run must not depend on its seed
    model = Model(dropout=0.4)
    saver = ModelCheckpoint(
        dirpath=root / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    run = trainer(root, stage, max_steps=STEPS, callbacks=[saver])
    run.fit(model, loader(shuffle=True), loader(8), ckpt_path=ckpt_path)
    return model.losses, whole_weights(model), torch.rand(2)


def _run_and_resume(root: Path, stage: int) -> list[Any]:
    paths = [str(root / "checkpoints" / f"step={step}.ckpt") for step in (4, 6, 9)]
    return [_run(root, stage, None), *(_run(root / "again", stage, path) for path in paths)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_within_an_epoch_is_bitwise_as_if_never_interrupted(
    tmp_path: Path, stage: int
) -> None:
    for full, *resumed in on_ranks(_run_and_resume, 2, tmp_path, stage):
        for step, (losses, weights, draw) in zip((4, 6, 9), resumed, strict=True):
            assert losses == full[0][step:]
            assert_same(weights, full[1])
            assert torch.equal(draw, full[2])


class Noisy(Dataset[Any]):
    """Every item is drawn anew from the process's random stream."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        if index >= self.rows:
            raise IndexError
        return torch.full((FEATURES,), index / 9) + torch.rand(FEATURES) / 9, torch.rand(3)


class Stream(IterableDataset[Any]):
    """Of unknown length: Lightning fetches one batch ahead."""

    def __iter__(self) -> Iterator[Any]:
        for index in range(24):
            yield torch.full((FEATURES,), index / 9), torch.full((3,), 0.5)


class Counter:
    """A loader that is no DataLoader and keeps its own place."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.at = self.at % 6, self.at % 6
        for index in range(start, 6):
            self.at += 1
            yield torch.full((4, FEATURES), index / 9), torch.full((4, 3), 0.5)

    def __len__(self) -> int:
        return 6

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def _loaders(kind: str) -> Any:
    if kind in ("stream", "shared"):
        return DataLoader(Stream(), batch_size=4)
    if kind == "stateful":
        return Counter()
    if kind in ("generator", "reloaded_generator"):
        own = torch.Generator().manual_seed(11)
        return DataLoader(Noisy(24), batch_size=4, shuffle=True, generator=own)
    if kind == "workers":
        whole = torch.utils.data.TensorDataset(torch.rand(24, FEATURES), torch.rand(24, 3))
        return DataLoader(whole, 4, shuffle=True, num_workers=2, persistent_workers=True)
    if kind in ("several", "reloaded_several"):
        short = DataLoader(Noisy(8), batch_size=4, shuffle=True)
        return CombinedLoader([DataLoader(Noisy(24), 4, shuffle=True), short], "max_size_cycle")
    return DataLoader(Noisy(24), batch_size=4, shuffle=True)


class Two(Model):
    """Of batches of one or of several loaders."""

    def loss(self, batch: Any) -> torch.Tensor:
        parts = batch if isinstance(batch[0], (list, tuple)) else [batch]
        total: torch.Tensor = sum(super(Two, self).loss(part) for part in parts)  # type: ignore[assignment]
        return total


def _options(kind: str) -> dict[str, Any]:
    return {
        "validation": {"val_check_interval": 2},
        "accumulate": {"accumulate_grad_batches": 2},
        "epochs": {"max_epochs": 3, "max_steps": -1},
        "shared": {"val_check_interval": 2, "limit_val_batches": 3},
        "limited": {"limit_train_batches": 4},
        "reloaded": {"reload_dataloaders_every_n_epochs": 1},
        "reloaded_generator": {"reload_dataloaders_every_n_epochs": 1},
        "reloaded_several": {"reload_dataloaders_every_n_epochs": 1},
        "reloaded_seldom": {"reload_dataloaders_every_n_epochs": 2, "max_steps": 20},
    }.get(kind, {})


def _continue(root: Path, kind: str, ckpt_path: str | None) -> Any:
    torch.manual_seed(7)
    data = _loaders(kind)
    L.seed_everything(7 if ckpt_path is None else 1234)
    model = Two(dropout=0.4)
    during = ModelCheckpoint(dirpath=root, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    after = ModelCheckpoint(
        dirpath=root, save_top_k=-1, filename="validated-{step}", save_on_train_epoch_end=False
    )
    ended = ModelCheckpoint(
        root, "ended-{step}", "train_loss", save_top_k=-1, save_on_train_epoch_end=True
    )
    callbacks = [during, after, ended] if ckpt_path is None else []
    options = {"max_steps": 14, "use_distributed_sampler": False, **_options(kind)}
    run = trainer(root, 2, callbacks=callbacks, enable_checkpointing=bool(callbacks), **options)
    validation = data if kind == "shared" else loader(8)
    run.fit(model, data, validation, ckpt_path=ckpt_path)
    return [loss for _, loss in model.losses], whole_weights(model), run.global_step


def _continue_from(root: Path, kind: str, names: list[str]) -> list[Any]:
    return [_continue(root, kind, None)] + [
        _continue(root, kind, str(root / f"{name}.ckpt")) for name in names
    ]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("plain", ["step=4", "step=6", "step=9", "validated-step=6"]),
        ("validation", ["step=3", "step=4", "validated-step=4", "validated-step=6", "step=6"]),
        ("accumulate", ["step=1", "step=3", "step=5"]),
        ("epochs", ["step=4", "step=6", "step=9"]),
        ("limited", ["step=3", "step=4", "step=6"]),
        ("generator", ["step=4", "step=6", "step=9"]),
        ("workers", ["step=9"]),
        ("stream", ["step=4", "step=6", "step=9"]),
        ("shared", ["step=2", "step=3", "validated-step=4", "step=5"]),
        ("reloaded", ["step=4", "step=6", "validated-step=6", "ended-step=6"]),
        ("reloaded_several", ["step=6", "validated-step=6", "ended-step=6"]),
        ("reloaded_generator", ["step=6", "validated-step=6", "ended-step=6"]),
        ("reloaded_seldom", ["ended-step=6", "step=8", "validated-step=12", "ended-step=12"]),
        ("several", ["step=3", "step=5", "step=9"]),
        ("stateful", ["step=4", "step=9"]),
    ],
)
def test_any_loader_continues_where_it_was(tmp_path: Path, kind: str, names: list[str]) -> None:
    full, *resumed = on_ranks(_continue_from, 1, tmp_path, kind, names)[0]
    for name, (losses, weights, steps) in zip(names, resumed, strict=True):
        assert steps == full[2], name
        assert len(losses) > 1, name
        assert losses == full[0][-len(losses) :], name
        assert_same(weights, full[1], name)


WINDOWS = {"accumulate_grad_batches": 4, "max_epochs": 2}  # of 4 and of 2 batches in each epoch


def _in_window(root: Path, stage: int, is_async: bool, ckpt_path: Path | None) -> Any:
    L.seed_everything(7 if ckpt_path is None else 1234)
    model = Model(dropout=0.4)
    callbacks = [SaveAfterEveryBatch()] if ckpt_path is None else []
    given = {"async_save": is_async}
    run = trainer(root, stage, callbacks=callbacks, strategy_options=given, **WINDOWS)
    run.fit(model, loader(shuffle=True), ckpt_path=ckpt_path)
    return [loss for _, loss in model.losses], whole_weights(model)


def _in_windows(root: Path, stage: int, is_async: bool) -> list[Any]:
    paths = [None, *(root / f"{batches}.ckpt" for batches in (1, 3, 5, 8))]
    return [_in_window(root, stage, is_async, path) for path in paths]


@pytest.mark.parametrize(
    ("stage", "is_async"), [(0, False), (1, False), (2, False), (3, False), (3, True)]
)
def test_an_accumulation_window_goes_on_with_the_gradients_that_it_had(
    tmp_path: Path, stage: int, is_async: bool
) -> None:
    for full, *resumed in on_ranks(_in_windows, 2, tmp_path, stage, is_async):
        for batches, (losses, weights) in zip((1, 3, 5, 8), resumed, strict=True):
            assert losses == full[0][batches:], batches
            assert_same(weights, full[1], str(batches))


class Manual(Model):
    """Steps the blocks after each batch and the rest after every fourth, wherever an epoch ends."""

    def __init__(self) -> None:
        super().__init__(dropout=0.4)
        self.automatic_optimization = False
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def configure_optimizers(self) -> Any:
        rest = [self.scale, *self.head.parameters(), *self.norm.parameters()]
        return torch.optim.AdamW(self.blocks.parameters(), lr=0.05), torch.optim.SGD(rest, lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        often, seldom = self.optimizers()
        loss = self.loss(batch)
        self.losses.append((self.global_step, loss.item()))
        self.manual_backward(loss)
        self.seen += 1
        often.step()
        if self.seen % 4 == 0:
            seldom.step()
            seldom.zero_grad()
        often.zero_grad()


def _by_hand(root: Path, stage: int, is_async: bool, ckpt_path: Path | None) -> Any:
    L.seed_everything(7 if ckpt_path is None else 1234)
    model = Manual()
    callbacks = [SaveAfterEveryBatch()] if ckpt_path is None else []
    given = {"async_save": is_async}
    run = trainer(root, stage, callbacks=callbacks, strategy_options=given, max_epochs=2)
    run.fit(model, loader(shuffle=True), ckpt_path=ckpt_path)
    return model.losses, whole_weights(model)


def _runs_by_hand(root: Path, stage: int, is_async: bool) -> list[Any]:
    paths = [None, *(root / f"{batches}.ckpt" for batches in HAND_WINDOWS)]
    return [_by_hand(root, stage, is_async, path) for path in paths]


HAND_WINDOWS = (1, 4, 6, 7)  # epochs have 6 batches


@pytest.mark.parametrize(
    ("stage", "is_async"), [(0, False), (1, False), (2, False), (3, False), (3, True)]
)
def test_a_window_under_manual_optimization_goes_on_with_the_gradients_that_it_had(
    tmp_path: Path, stage: int, is_async: bool
) -> None:
    # Only of rank 0: the others' batch norm statistics are theirs, since DDP does not exchange them here.
    full, *resumed = on_ranks(_runs_by_hand, 2, tmp_path, stage, is_async)[0]
    for batches, (losses, weights) in zip(HAND_WINDOWS, resumed, strict=True):
        assert [loss for _, loss in losses] == [loss for _, loss in full[0]][batches:], batches
        assert_same(weights, full[1], str(batches))


def test_gradients_that_were_stepped_with_are_not_stored(tmp_path: Path) -> None:
    """However they wait to be zeroed: only what an optimizer has not stepped with."""
    on_ranks(_by_hand, 2, tmp_path, 2, False, None)
    with Checkpoint(LocalStorage(), str(tmp_path / "3.ckpt")) as checkpoint:
        kept = checkpoint.rank_objects(0)["gradients"]
    assert {name.removesuffix("#part") for name in kept} == {
        "scale",
        "head.weight",
        "norm.weight",
        "norm.bias",
    }
    with Checkpoint(LocalStorage(), str(tmp_path / "4.ckpt")) as checkpoint:
        assert not checkpoint.rank_objects(0)["gradients"]


def test_gradients_without_a_place_are_told() -> None:
    """A part of a reduced gradient, in a model that is whole on every rank."""
    module, gradients = nn.Linear(2, 2), {"weight#part": torch.ones(1, 2)}
    resumption = Resumption(PendingRng({}, torch.device("cpu")), True, gradients=gradients)
    assert "sharded in another way" in resumption.reopen_window(module)
    assert module.weight.grad is None


class Looking(L.Callback):
    """Sees the weights before the strategy is set up."""

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        assert trainer.state.fn == "fit"


def _in_precision(root: Path, stage: int, precision: Any, ckpt_path: str | None) -> Any:
    L.seed_everything(7 if ckpt_path is None else 1234)
    model = Model(dropout=0.4)
    saver = ModelCheckpoint(root, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    callbacks = [Looking(), *([saver] if ckpt_path is None else [])]
    run = trainer(root, stage, max_steps=6, precision=precision, callbacks=callbacks)
    run.fit(model, loader(shuffle=True), ckpt_path=ckpt_path)
    return model.losses, whole_weights(model)


def _in_precisions(root: Path, precision: str) -> list[Any]:
    found = []
    for stage in (0, 3):
        folder = root / str(stage)
        full = _in_precision(folder, stage, precision, None)
        found.append((full, _in_precision(folder, stage, precision, str(folder / "step=3.ckpt"))))
    return found


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_weights_of_any_precision_come_back_exactly(tmp_path: Path, precision: str) -> None:
    for results in on_ranks(_in_precisions, 2, tmp_path, precision):
        for full, resumed in results:
            assert resumed[0] == full[0][3:]
            assert_same(resumed[1], full[1])
