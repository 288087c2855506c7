"""The place in an epoch at another number of ranks: nothing skipped, and the epoch ends as it should."""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.lightning.harness import FEATURES, Model, SaveAfterEveryBatch, loader, on_ranks, trainer
from zero_ckpt.lightning.epochs import scaled, within

SIZES = range(1, 5)


def test_a_place_is_rounded_down_to_the_beginning_of_a_window() -> None:
    for done, saved, ranks, window, before in product(range(13), SIZES, SIZES, SIZES, SIZES):
        place = scaled(done, saved, ranks, window=window, saved_window=before)
        again = done * saved - place * ranks  # batches that are seen a second time
        assert place % window == 0
        assert 0 <= again < window * ranks + before * saved


def test_a_place_in_an_unfinished_epoch_is_in_it_at_any_number_of_ranks() -> None:
    for rows, saved, ranks, window in product(range(1, 40), SIZES, SIZES, SIZES):
        batches = -(-rows // saved)
        for done in range(batches):
            assert scaled(done, saved, ranks, window=window) < -(-rows // ranks)


def test_a_place_beyond_a_limited_epoch_is_in_its_last_window() -> None:
    for place, batches, window in product(range(12), range(1, 9), SIZES):
        held = within(place // window * window, batches, window)
        assert held % window == 0
        assert held < batches
        assert held == place // window * window or batches - held <= window


ROWS = 48  # of which a batch has 2


class Told(Model):
    """Remembers which rows it saw, after which batches it stepped, and when it was validated."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.rows: list[list[int]] = []
        self.events: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.rows.append([])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fail_at:
            raise ZeroDivisionError
        if not self.rows:  # in the middle of an epoch
            self.rows.append([])
        self.rows[-1] += batch[2].tolist()
        return super().training_step(batch[:2], batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.events.append(self.trainer.fit_loop.batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.events.append("validated")


class SaveAtTheEnd(L.Callback):
    def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/exception.ckpt")


def _rows() -> DataLoader[Any]:
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))
    rows = TensorDataset(x, x[:, :3], torch.arange(ROWS))
    return DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, shuffle=False))


def _save_everywhere(root: Path) -> None:
    run = trainer(
        root, 2, max_epochs=1, accumulate_grad_batches=2, callbacks=[SaveAfterEveryBatch()]
    )
    run.fit(Told(), _rows())
    run = trainer(root, 2, max_epochs=1, accumulate_grad_batches=2, callbacks=[SaveAtTheEnd()])
    with pytest.raises(ZeroDivisionError):
        run.fit(Told(fail_at=4), _rows())


def _resume(root: Path, name: str, accumulate: int, **limits: Any) -> dict[str, Any]:
    warnings.filterwarnings("ignore", ".*is resumed by")
    model = Told()
    best = ModelCheckpoint(root / f"best-{name}", monitor="val_loss")
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, **limits}
    run = trainer(root, 2, callbacks=[best], **options)
    run.fit(model, _rows(), loader(8), ckpt_path=str(root / f"{name}.ckpt"))
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, model.rows)
    epochs = [sorted(row for part in parts for row in part) for parts in zip(*seen, strict=True)]
    return {"epochs": epochs, "events": model.events, "best": best.best_model_path}


def _resume_all(root: Path, names: list[str], accumulate: int) -> list[dict[str, Any]]:
    return [_resume(root, name, accumulate) for name in names]


@pytest.mark.parametrize(
    ("saved", "ranks", "accumulate", "starts"),  # starts: place -> the first row that is seen
    [
        (2, 1, 2, {"2": 8, "3": 8, "4": 16, "11": 40, "exception": 16, "12": 0}),
        (1, 2, 2, {"2": 0, "3": 0, "6": 8, "23": 40, "exception": 8, "24": 0}),
        (3, 2, 2, {"2": 8, "4": 24, "7": 32, "8": 0}),
        (3, 2, 1, {"2": 12, "5": 24}),
    ],
)
def test_the_rest_of_an_epoch_is_seen_once_and_ends_as_it_should(
    tmp_path: Path, saved: int, ranks: int, accumulate: int, starts: dict[str, int]
) -> None:
    on_ranks(_save_everywhere, saved, tmp_path)
    batches = ROWS // 2 // ranks
    steps = [index for index in range(batches) if (index + 1) % accumulate == 0]
    resumed = on_ranks(_resume_all, ranks, tmp_path, list(starts), accumulate)[0]
    for (name, start), run in zip(starts.items(), resumed, strict=True):
        place = start // 2 // ranks
        rest = [index for index in steps if index >= place]
        assert run["epochs"][0] == list(range(start, ROWS)), name
        assert run["epochs"][-1] == list(range(ROWS)), name
        first = [] if len(run["epochs"]) == 1 else [*rest, "validated"]  # it may be over already
        assert run["events"] == [*first, *steps, "validated"], name
        assert run["best"], name


class Stopping(Model):
    """Stops in the middle of its first epoch, and tells which batches it saw."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.events: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.events.append((self.current_epoch, batch_idx))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.stop_at:
            self.trainer.should_stop = True


SAVES: dict[str, dict[str, Any]] = {
    "epoch ends": {"save_on_train_epoch_end": True},
    "validated": {"save_on_train_epoch_end": False},
    "in between": {"every_n_train_steps": 3},
}


def _stop_and_resume(root: Path, strategy: str) -> dict[str, list[tuple[int, int]]]:
    seen = {}
    for name, options in SAVES.items():
        saver = ModelCheckpoint(root / strategy / name, filename="a", **options)
        run = trainer(root, 2, strategy=strategy, max_epochs=3, callbacks=[saver])
        run.fit(Stopping(2), loader(), loader(8))
        run.save_checkpoint(root / strategy / name / "after.ckpt")
        for tag in ("a", "after"):
            model = Stopping()
            run = trainer(root, 2, strategy=strategy, max_epochs=2)
            path = str(root / strategy / name / f"{tag}.ckpt")
            run.fit(model, loader(), loader(8), ckpt_path=path)
            seen[f"{name}, {tag}"] = model.events
    return seen


def _stop_under_both(root: Path) -> list[dict[str, list[tuple[int, int]]]]:
    return [_stop_and_resume(root, strategy) for strategy in ("ddp", "zero_ckpt_stage_2")]


def test_a_run_that_stopped_within_an_epoch_goes_on_where_lightning_does(tmp_path: Path) -> None:
    for ddp, ours in on_ranks(_stop_under_both, 2, tmp_path):
        assert ddp == ours
        assert ours["epoch ends, a"] == [(1, index) for index in range(6)]
        assert ours["in between, a"][:4] == [(0, 3), (0, 4), (0, 5), (1, 0)]


def _resume_limited(root: Path) -> dict[str, Any]:
    return _resume(root, "11", 2, limit_train_batches=6)


def test_an_epoch_that_is_shorter_now_ends_with_its_last_window(tmp_path: Path) -> None:
    on_ranks(_save_everywhere, 2, tmp_path)
    (run,) = on_ranks(_resume_limited, 1, tmp_path)
    assert run["epochs"] == [list(range(8, 12)), list(range(12))]
    assert run["events"] == [5, "validated", 1, 3, 5, "validated"]
