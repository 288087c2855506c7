"""A loader that trained serves other runs, and it and its trainer are copied and pickled as what the user made."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.lightning.harness import FEATURES, Model, loader, on_ranks, trainer


class Stream(IterableDataset[Any]):
    """Lightning gives it no sampler, so that the loader in use is the user's own."""

    def __iter__(self) -> Iterator[Any]:
        for index in range(12):
            yield torch.full((FEATURES,), index / 9), torch.full((3,), 0.5)


class Named(DataLoader[Any]):
    """A loader of the user's own class, with an attribute."""

    def __init__(self, dataset: Any, label: str, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.label = label


def _rows(data: Any) -> list[Any]:
    return [batch[0].tolist() for batch in data]


def _use_again(root: Path) -> None:
    for data in (DataLoader(Stream(), batch_size=4), Named(Stream(), "user's", batch_size=4)):
        run, model, rows = trainer(root, 2, max_epochs=2), Model(), _rows(data)
        run.fit(model, data)
        predicted = run.predict(model, data)  # for which Lightning makes a loader of its class anew
        assert predicted is not None
        assert [len(batch) for batch in predicted] == [4, 4, 4]
        run.validate(model, data, verbose=False)
        run.test(model, data, verbose=False)
        run.fit_loop.max_epochs = 3
        run.fit(model, data)
        assert [step for step, _ in model.losses] == list(range(9))
        assert _rows(data) == rows


def test_a_loader_that_trained_serves_every_other_run(tmp_path: Path) -> None:
    on_ranks(_use_again, 1, tmp_path)


class CopyWithin(L.Callback):
    """Copies the loader while its epoch is not over."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.copied = copy.deepcopy(trainer.train_dataloader)


def _copy(root: Path) -> None:
    data = Named(Stream(), "user's", batch_size=4)
    rows, within = _rows(data), CopyWithin()
    run = trainer(root, 2, max_steps=2, callbacks=[within], enable_checkpointing=False)
    run.fit(Model(), data)
    assert hasattr(data, "load_state_dict")  # the strategy does track it
    copies = [copy.copy(data), copy.deepcopy(data), within.copied]
    copies += [pickle.loads(pickle.dumps(data, protocol)) for protocol in (0, 2, 5)]
    for each in copies:
        assert type(each) is Named
        assert each.label == "user's"
        assert not [name for name in vars(each) if name.startswith("_zero_")]
        assert _rows(each) == rows


def test_copies_and_pickles_of_a_loader_are_of_its_own_class(tmp_path: Path) -> None:
    on_ranks(_copy, 1, tmp_path)


class Twin(L.Callback):
    """Copies and pickles its trainer, as callbacks do that keep their first state."""

    def __init__(self) -> None:
        self.copied: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, *args: Any) -> None:
        copy.deepcopy(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        pickle.dumps(trainer)
        self.copied.append(copy.deepcopy(trainer))


def _copy_trainer(root: Path) -> None:
    path: Path | None = None
    for options in ({}, {"gradient_clip_val": 0.1}):
        steps, twin = 4 if path else 2, Twin()
        run = trainer(
            root, 2, max_steps=steps, callbacks=[twin], enable_checkpointing=False, **options
        )
        model = Model()
        run.fit(model, loader(), loader(8), ckpt_path=path)
        twin.on_train_batch_end(run)
        assert all(type(each.train_dataloader) is DataLoader for each in twin.copied)
        assert len(twin.copied) == 3
        assert [step for step, _ in model.losses] == list(range(steps - 2, steps))
        path = root / "two.ckpt"
        run.save_checkpoint(path)


def test_one_process_alone_copies_its_trainer_within_fit_and_after(tmp_path: Path) -> None:
    on_ranks(_copy_trainer, 1, tmp_path)
