"""What happens to checkpoint folders: top-k, links, removal, exceptions, tuners."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.plugins.environments import SLURMEnvironment

from tests.lightning.harness import Model, loader, on_ranks, trainer, whole_weights
from tests.workers import start_ranks
from zero_ckpt.core.checkpoint import open_checkpoint


class LinkWatcher(L.Callback):
    """Says whether `last.ckpt` ever dangled after a checkpoint was removed."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.looks = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        strategy, remove = trainer.strategy, trainer.strategy.remove_checkpoint

        def watched(path: Any) -> None:
            remove(path)
            last = Path(path).parent / "last.ckpt"
            if last.is_symlink():
                self.looks += 1
                if not last.exists():
                    self.problems.append(f"dangles after removing {path}")

        strategy.remove_checkpoint = watched


def _top_k(root: Path, stage: int, save_last: Any) -> Any:
    L.seed_everything(1)
    folder = root / f"{stage}-{save_last}"
    watcher = LinkWatcher()
    saver = ModelCheckpoint(
        dirpath=folder, monitor="val_loss", save_top_k=1, save_last=save_last, filename="{epoch}"
    )
    run = trainer(root, stage, max_epochs=4, callbacks=[watcher, saver])
    run.fit(Model(), loader(), loader(8))
    run.strategy.barrier()
    names = sorted(os.listdir(folder))
    steps = [open_checkpoint(folder / name).manifest.step for name in names[:2]]
    links = [name for name in names if (folder / name).is_symlink()]
    return names, steps, links, watcher.problems, watcher.looks


def _top_k_everywhere(root: Path) -> list[Any]:
    return [_top_k(root, stage, last) for stage in (0, 3) for last in (True, "link")]


def test_top_k_and_last_leave_whole_folders_and_no_dangling_link(tmp_path: Path) -> None:
    results = on_ranks(_top_k_everywhere, 2, tmp_path)
    for names, steps, links, problems, _ in (found for rank in results for found in rank):
        assert len(names) == 3
        assert names[0].startswith("epoch=")
        assert names[1:] == ["last.ckpt", "latest"]
        assert steps[0] == steps[1]
        assert problems == []
        assert links in ([], ["last.ckpt"])
    assert [bool(found[2]) for found in results[0]] == [False, True, False, True]
    assert all(found[4] > 0 for found in results[0] if found[2])  # a link lost its target


def _weights_only(root: Path) -> list[str]:
    """A checkpoint of weights alone: tested from, even after fit; not resumed from."""
    found = []
    for stage in range(4):
        L.seed_everything(2)
        folder = root / str(stage)
        saver = ModelCheckpoint(dirpath=folder, save_weights_only=True, filename="a")
        model = Model()
        run = trainer(root, stage, max_epochs=1, callbacks=[saver])
        run.fit(model, loader(), loader(8))
        run.test(model, loader(8), str(folder / "a.ckpt"), verbose=False)
        with pytest.raises(KeyError) as caught:
            trainer(root, stage, max_epochs=2).fit(
                Model(), loader(), ckpt_path=str(folder / "a.ckpt")
            )
        found.append(str(caught.value))
        assert open_checkpoint(folder / "a.ckpt").keys("optim") == []
    return found


def test_a_checkpoint_of_weights_alone(tmp_path: Path) -> None:
    for problems in on_ranks(_weights_only, 2, tmp_path):
        assert all("contains only the model" in problem for problem in problems)


class Failing(Model):
    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = ranks

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and self.global_rank in self.ranks:
            raise ValueError("the user's own mistake")


def _fails(root: Path, ranks: tuple[int, ...]) -> Any:
    callbacks = [
        OnExceptionCheckpoint(root / "exception"),
        ModelCheckpoint(root / "other", save_on_exception=True),
    ]
    options = {"save_timeout": 5.0}
    run = trainer(root, 3, max_epochs=1, callbacks=callbacks, strategy_options=options)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="mistake"):
            run.fit(Failing(ranks), loader())
    told = [str(w.message) for w in caught if "no checkpoint was written" in str(w.message)]
    return time.monotonic() - began, told


def test_an_exception_on_all_ranks_is_saved_and_resumed(tmp_path: Path) -> None:
    on_ranks(_fails, 2, tmp_path, (0, 1))
    with open_checkpoint(tmp_path / "exception" / "on_exception.ckpt") as checkpoint:
        assert checkpoint.manifest.step == 2


def test_an_exception_on_one_rank_surfaces_in_bounded_time(tmp_path: Path) -> None:
    # Rank 0 waits in a collective for rank 1, which is what happens in training; it is killed.
    with start_ranks(_fails, 2, tmp_path, (1,)) as ranks:
        outcomes = ranks.wait(timeout=25)
    assert outcomes[1].status == "returned", outcomes[1].describe()
    seconds, told = outcomes[1].value
    assert seconds < 20
    assert len(told) == 1, "the second save does not wait again"
    assert "rank 0" in told[0]
    assert not (tmp_path / "exception" / "on_exception.ckpt" / "manifest.json").exists()


class Preempted(L.Callback):
    """Sends itself SLURM's signal: rank 0 before a collective in which rank 1 waits for it, rank 1 after that."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 0 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR2)


def _in_slurm(root: Path) -> dict[str, Any]:
    """Options of a trainer in a job of two ranks, whose `scontrol` writes into `root`."""
    rank = os.environ["RANK"]
    slurm = {"JOB_ID": "77", "NTASKS": "2", "PROCID": rank, "LOCALID": rank, "NODEID": "0"}
    os.environ.update({f"SLURM_{name}": value for name, value in slurm.items()})
    os.environ["SLURM_NTASKS_PER_NODE"] = "2"
    os.environ["PATH"] = f"{root}:{os.environ['PATH']}"
    environment = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    return {"plugins": [environment], "enable_checkpointing": False}


def _requeued(root: Path) -> Any:
    options = _in_slurm(root)
    callbacks = [Preempted()]
    run = trainer(root, 2, max_steps=5, callbacks=callbacks, **options)
    run.fit(Model(), loader())
    again = trainer(root, 2, max_steps=5, **options)
    again.fit(model := Model(), loader())
    return run.global_step, run.callbacks == callbacks, model.losses[0][0]


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """The file into which it writes what it was asked for."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    return tmp_path / "asked"


def test_slurms_signal_is_answered_by_all_ranks_after_the_same_batch(
    tmp_path: Path, scontrol: Path
) -> None:
    for steps, has_users_callbacks, first in on_ranks(_requeued, 2, tmp_path):
        assert steps == 5, "the job goes on until SLURM ends it"
        assert has_users_callbacks
        assert first == 4, "the next job resumes from what was saved"
    assert scontrol.read_text() == "requeue 77\n"


class PreemptedAtTheEnd(L.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)


def _requeued_at_the_end(root: Path) -> None:
    trainer(root, 2, max_steps=2, callbacks=[PreemptedAtTheEnd()], **_in_slurm(root)).fit(
        Model(), loader()
    )


def test_slurms_signal_behind_the_last_batch_is_answered(tmp_path: Path, scontrol: Path) -> None:
    on_ranks(_requeued_at_the_end, 2, tmp_path)
    assert scontrol.read_text() == "requeue 77\n"
    assert open_checkpoint(tmp_path / "hpc_ckpt_1.ckpt").manifest.step == 2


def _own_handler(root: Path) -> int:
    seen: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    trainer(root, 2, max_steps=2, callbacks=[PreemptedAtTheEnd()], **_in_slurm(root)).fit(
        Model(), loader()
    )
    return len(seen)


def test_a_users_own_handler_of_slurms_signal_stays(tmp_path: Path, scontrol: Path) -> None:
    assert on_ranks(_own_handler, 2, tmp_path) == [0, 1]
    assert not scontrol.exists()


def _lr_find(root: Path, stage: int) -> Any:
    L.seed_everything(1)
    model = Model()
    finder = LearningRateFinder(num_training_steps=4, update_attr=False, early_stop_threshold=None)
    run = trainer(root, stage, max_epochs=1, callbacks=[finder], enable_checkpointing=False)
    run.fit(model, loader())
    return model.losses[4:], whole_weights(model), sorted(os.listdir(root))


def _lr_find_everywhere(root: Path) -> list[Any]:
    return [_lr_find(root, stage) for stage in range(4)]


def test_learning_rate_finder_restores_the_live_model(tmp_path: Path) -> None:
    for expected, *others in on_ranks(_lr_find_everywhere, 2, tmp_path):
        assert len(expected[0]) == 6
        assert expected[2] == []
        for losses, weights, names in others:
            assert losses == expected[0]
            assert names == []
            for key, value in expected[1].items():
                torch.testing.assert_close(weights[key], value)
