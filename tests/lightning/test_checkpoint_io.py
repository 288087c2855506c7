"""`ZeroCheckpointIO` under Lightning's own strategies; and other plugins under ours."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

from tests.lightning.harness import (
    Model,
    Probe,
    assert_same,
    loader,
    on_ranks,
    trainer,
)
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.errors import CheckpointNotFoundError, ConfigurationError, UnsafeObjectError
from zero_ckpt.lightning import ZeroCheckpointIO


def _fit(root: Path, strategy: str, path: str | None = None, **options: Any) -> Any:
    L.seed_everything(1)
    probe = Probe()
    model = Model()
    saver = ModelCheckpoint(dirpath=root, filename="{step}", save_last="link")
    run = trainer(
        root,
        0,
        strategy=strategy,
        plugins=[ZeroCheckpointIO()],
        max_epochs=1 if path is None else 2,
        callbacks=[probe, saver],
        **options,
    )
    run.fit(model, loader(), ckpt_path=path)
    if path is not None:
        return probe.seen
    probe.on_train_start(run, model)
    return probe.seen


def _alone(root: Path, strategy: str) -> Any:
    return _fit(root, strategy), _fit(root, strategy, str(root / "last.ckpt"))


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("auto", 1)])
def test_works_alone_under_other_strategies(tmp_path: Path, strategy: str, world_size: int) -> None:
    for rank, (saved, resumed) in enumerate(on_ranks(_alone, world_size, tmp_path, strategy)):
        if rank == 0:  # buffers are rank 0's
            assert_same(saved, resumed)
    assert (tmp_path / "last.ckpt").is_symlink()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.manifest.world_size == 1
        assert "blocks.0.lower.weight" in checkpoint.keys("model")
        assert len(checkpoint.keys("optim")) > 20


def _into_zero(root: Path) -> Any:
    saved = _fit(root, "ddp")
    found = []
    for stage in (1, 3):
        probe = Probe()
        run = trainer(root, stage, max_epochs=2, callbacks=[probe])
        run.fit(Model(), loader(), ckpt_path=str(root))
        found.append(probe.seen)
    return saved, found


def test_its_checkpoints_resume_under_zero(tmp_path: Path) -> None:
    results = on_ranks(_into_zero, 2, tmp_path)
    for _, found in results:
        for seen in found:
            assert_same(results[0][0], seen)


def _zero_into_ddp(root: Path) -> Any:
    L.seed_everything(1)
    run = trainer(root, 3, max_epochs=1)
    model = Model()
    run.fit(model, loader())
    saved = Probe()
    saved.on_train_start(run, model)
    run.save_checkpoint(root / "zero.ckpt")
    probe = Probe()
    run = trainer(
        root, 0, strategy="ddp", plugins=[ZeroCheckpointIO()], max_epochs=2, callbacks=[probe]
    )
    run.fit(Model(), loader(), ckpt_path=str(root / "zero.ckpt"))
    return saved.seen, probe.seen


def test_checkpoints_of_zero_resume_under_ddp(tmp_path: Path) -> None:
    results = on_ranks(_zero_into_ddp, 2, tmp_path)
    for _, resumed in results:
        assert_same(results[0][0], resumed)


def test_both_copies_of_lightning_accept_it() -> None:
    io = ZeroCheckpointIO()
    for copy in (L, pytorch_lightning):
        assert isinstance(io, copy.plugins.CheckpointIO)
        run = copy.Trainer(accelerator="cpu", devices=1, plugins=[io], logger=False)
        assert run.strategy.checkpoint_io is io


def test_empty_wrappers_are_filled_with_it_at_any_depth() -> None:
    inner = AsyncCheckpointIO()
    outer = AsyncCheckpointIO(AsyncCheckpointIO(inner))
    run = L.Trainer(
        strategy="zero_ckpt", accelerator="cpu", devices=1, plugins=[outer], logger=False
    )
    assert run.strategy.checkpoint_io is outer
    assert isinstance(inner.checkpoint_io, ZeroCheckpointIO)


def test_a_module_that_no_trainer_runs_is_saved(tmp_path: Path) -> None:
    run = L.Trainer(strategy="zero_ckpt", accelerator="cpu", devices=1, logger=False)
    model = Model()
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "bare.ckpt")
    content = ZeroCheckpointIO().load_checkpoint(tmp_path / "bare.ckpt")
    assert_same(content["state_dict"], dict(model.state_dict()))


def test_a_bare_state_dict_goes_to_a_plain_file(tmp_path: Path) -> None:
    io = ZeroCheckpointIO()
    path = str(tmp_path / "deep" / ".temp.ckpt")
    state = {"weight": torch.arange(3.0), "_extra_state": {"a": 1}}
    io.save_checkpoint(state, path)
    assert os.listdir(tmp_path / "deep") == [".temp.ckpt"]
    assert_same(io.load_checkpoint(path), state)
    io.remove_checkpoint(path)
    assert os.listdir(tmp_path / "deep") == []
    io.teardown()


def _content(value: Any) -> dict[str, Any]:
    return {"pytorch-lightning_version": "2.6.0", "global_step": 3, "value": value}


def test_content_comes_back_with_its_types(tmp_path: Path) -> None:
    io = ZeroCheckpointIO()
    shared = torch.arange(6.0).view(2, 3)
    content = _content([(1, "two"), {3: 4.5}, None])
    content["state_dict"] = {"a": shared, "tied": shared, "counter": torch.tensor(4)}
    content["optimizer_states"] = [
        {
            "state": {0: {"step": torch.tensor(2.0), "exp_avg": shared * 2, "flag": True, "n": 7}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}],
        }
    ]
    content["lr_schedulers"] = [{"last_epoch": 3}]
    io.save_checkpoint(content, tmp_path / "a.ckpt")
    loaded = io.load_checkpoint(tmp_path / "a.ckpt")
    loaded["optimizer_states"][0].pop("class")
    assert_same(content, loaded)
    assert loaded["state_dict"]["a"] is loaded["state_dict"]["tied"]


class Opaque:
    pass


def test_a_pickled_object_needs_weights_only_false(tmp_path: Path) -> None:
    io = ZeroCheckpointIO()
    with pytest.warns(UserWarning, match="stored as pickles: 'client_state/value'"):
        io.save_checkpoint(_content(Opaque()), tmp_path / "a.ckpt")
    with pytest.raises(UnsafeObjectError, match="value"):
        io.load_checkpoint(tmp_path / "a.ckpt")
    loaded = io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert isinstance(loaded["value"], Opaque)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    io = ZeroCheckpointIO()
    with pytest.raises(ConfigurationError, match="storage_options"):
        io.save_checkpoint({}, tmp_path / "a", storage_options={})
    with pytest.raises(ConfigurationError, match="nosuchstore://"):
        io.save_checkpoint(_content(1), "nosuchstore://bucket/a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        io.load_checkpoint(tmp_path / "nothing.ckpt")
    (tmp_path / "foreign.ckpt").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"foreign\.ckpt"):
        io.load_checkpoint(tmp_path / "foreign.ckpt")


def _foreign(root: Path, stage: int, io: Any) -> Any:
    """A user's plugin under our strategy: save, resume, and what the file holds."""
    L.seed_everything(1)
    probe = Probe()
    model = Model()
    saver = ModelCheckpoint(dirpath=root / str(stage), filename="a", save_top_k=1)
    run = trainer(root, stage, plugins=[io], max_epochs=2, callbacks=[probe, saver])
    run.fit(model, loader())
    saved = Probe()
    saved.on_train_start(run, model)
    path = root / str(stage) / "a.ckpt"
    assert not run.is_global_zero or not path.is_file() or os.listdir(path.parent) == ["a.ckpt"]
    run.strategy.barrier()
    run = trainer(root, stage, plugins=[type(io)()], max_epochs=3, callbacks=[probe])
    run.fit(Model(), loader(), ckpt_path=str(path))
    return saved.seen, probe.seen, path.is_file()


def _foreign_everywhere(root: Path) -> Any:
    kinds = (TorchCheckpointIO, AsyncCheckpointIO)
    return [_foreign(root / k.__name__, stage, k()) for k in kinds for stage in range(4)]


def test_another_plugin_gets_the_whole_checkpoint_on_rank_0(tmp_path: Path) -> None:
    results = on_ranks(_foreign_everywhere, 2, tmp_path, timeout=120)
    for rank in results:
        for (saved, _, _), (_, resumed, _) in zip(results[0], rank, strict=True):
            assert_same(saved, resumed)
        assert [kind for *_, kind in rank] == [True] * 4 + [False] * 4
    path = str(tmp_path / "TorchCheckpointIO" / "1" / "a.ckpt")
    content = torch.load(path, weights_only=True)
    state = content["optimizer_states"][0]
    assert set(state["state"]) == set(state["param_groups"][0]["params"]) == set(range(12))
    torch.optim.AdamW(Model().parameters()).load_state_dict(state)


def test_a_checkpoint_that_another_thread_saves_is_removed_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's AsyncCheckpointIO writes on a thread, and keeps the best few on another."""
    begun, go, save = threading.Event(), threading.Event(), SyncEngine.save

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return save(*args, **kwargs)

    monkeypatch.setattr(SyncEngine, "save", slow)
    io, path = ZeroCheckpointIO(), tmp_path / "a.ckpt"
    content = {"pytorch-lightning_version": "2.6", "state_dict": {"w": torch.ones(3)}}
    saver = threading.Thread(target=io.save_checkpoint, args=(content, path))
    saver.start()
    assert begun.wait(30)
    remover = threading.Thread(target=io.remove_checkpoint, args=(path,))
    remover.start()
    remover.join(0.2)
    go.set()
    saver.join()
    remover.join()
    assert not path.exists()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    ZeroCheckpointIO().save_checkpoint({"weights": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        ZeroCheckpointIO().save_checkpoint({"weights": lambda: 2}, path)
    assert os.listdir(tmp_path) == ["weights.ckpt"]
    assert torch.load(path) == {"weights": 1}


def test_a_file_is_durable_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        done.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    def replaced(source: str, target: str) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    ZeroCheckpointIO().save_checkpoint({"weights": 1}, tmp_path / "weights.ckpt")
    assert done == ["sync .weights.ckpt.part", "rename", f"sync {tmp_path.name}"]
