"""Ranks agree on what is loaded, or all raise the same; damage is found before anything changes."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.lightning.harness import (
    Model,
    Probe,
    assert_same,
    loader,
    on_ranks,
    trainer,
    whole_weights,
)
from tests.told import told_once
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptShardError,
    DisagreementError,
    FormatVersionError,
    SaveError,
    StateMismatchError,
    ZeroCkptError,
)
from zero_ckpt.lightning import ZeroStrategy, data
from zero_ckpt.lightning.weights import UnfitWeightsError


def _save_two(root: Path) -> Any:
    """Two checkpoints, of steps 2 and 4; what was saved by the first."""
    L.seed_everything(1)
    model = Model()
    run = trainer(root, 2, max_steps=2)
    run.fit(model, loader())
    probe = Probe()
    probe.on_train_start(run, model)
    run.save_checkpoint(root / "c" / "a.ckpt")
    run = trainer(root, 2, max_steps=4)
    run.fit(Model(), loader(), ckpt_path=str(root / "c" / "a.ckpt"))
    run.save_checkpoint(root / "c" / "b.ckpt")
    return probe.seen


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("saved")
    return root, on_ranks(_save_two, 2, root)[0]


@pytest.fixture
def saved(original: tuple[Path, Any], tmp_path: Path) -> Any:
    """What was saved at step 2; the checkpoints are in `tmp_path`."""
    shutil.copytree(original[0] / "c", tmp_path / "c")
    return original[1]


def _flip(folder: Path, role: str) -> None:
    path = next(folder.glob(f"{role}-00001-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[4100] ^= 1  # behind the header
    path.write_bytes(data)


def _fit(root: Path, stage: int, path: Path, model: Any = None) -> Any:
    probe = Probe()
    run = trainer(root, stage, max_steps=6, callbacks=[probe])
    run.fit(model or Model(), loader(), ckpt_path=str(path))
    return probe.seen


def _resume_damaged(root: Path, stage: int) -> Any:
    """From the directory: the older checkpoint. From the damaged one: an error, nothing loaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = _fit(root, stage, root / "c")
    told = [str(w.message) for w in caught if "falling back" in str(w.message)]
    model = Model()
    before = whole_weights(model)
    with pytest.raises(CorruptShardError) as error:
        _fit(root, stage, root / "c" / "b.ckpt", model)
    assert_same(whole_weights(model), before)
    trainer(root, stage).validate(model, loader(8), str(root / "c" / "a.ckpt"), verbose=False)
    return seen, told, str(error.value)


@pytest.mark.parametrize("role", ["model", "optim", "state"])
def test_damage_is_found_before_anything_is_loaded(tmp_path: Path, saved: Any, role: str) -> None:
    _flip(tmp_path / "c" / "b.ckpt", role)
    stage = {"model": 0, "optim": 1, "state": 3}[role]
    by_rank = on_ranks(_resume_damaged, 2, tmp_path, stage)
    for seen, _, error in by_rank:
        assert_same(saved, seen)
        assert f"{role}-00001-of-00002" in error
    (text,) = told_once([told for _, told, _ in by_rank])
    assert "a.ckpt" in text


def _disagree(root: Path) -> list[str]:
    problems = []
    path = root / "c" / "a.ckpt"
    for finds in ((True, False), (False, True)):
        run = trainer(root, 3, max_steps=6)
        found = str(path) if finds[dist.get_rank()] else None
        with pytest.raises(DisagreementError) as error:
            run.fit(Model(), loader(), ckpt_path=found)
        problems.append(str(error.value))
    other = root / ("c" if dist.get_rank() == 0 else "elsewhere") / "a.ckpt"
    seen = _fit(root, 3, other)
    return [*problems, seen["weights"]]


def test_ranks_that_find_different_checkpoints_agree_or_raise(tmp_path: Path, saved: Any) -> None:
    for first, second, weights in on_ranks(_disagree, 2, tmp_path):
        assert "ranks [1]" in first
        assert "ranks [0]" in second
        assert_same(weights, saved["weights"])  # rank 0's path


class Two(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.SGD(parameters[:4], 0.1), torch.optim.SGD(parameters[4:], 0.1)]


class Regrouped(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([self.scale, self.head.weight], lr=0.1)


class Resized(Model):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, 3))


class Renamed(Model):
    def __init__(self) -> None:
        super().__init__()
        self.neck = self.head
        del self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _mismatches(root: Path) -> list[str]:
    problems = []
    # Two has no LR scheduler, which is told before the optimizers are compared.
    warnings.filterwarnings("ignore", ".*LR scheduler that the job has not")
    for stage in (1, 3):
        for kind, error in (
            (Two, StateMismatchError),
            (Regrouped, StateMismatchError),
            (Resized, UnfitWeightsError),
        ):
            with pytest.raises(error) as caught:
                _fit(root, stage, root / "c" / "a.ckpt", kind())
            problems.append(str(caught.value))
        with pytest.raises(UnfitWeightsError, match="set strict_loading = False on the module"):
            _fit(root, stage, root / "c" / "a.ckpt", Renamed())
        with pytest.raises(CheckpointNotFoundError) as misspelled:
            _fit(root, stage, root / "c" / "q.ckpt", Model())
        problems.append(str(misspelled.value))
    for part in ("c/latest", "c/a.ckpt/manifest.json", "c/a.ckpt/model-00000-of-00002.safetensors"):
        folder = re.escape(f"Give its folder, {os.path.dirname(root / part)}")
        with pytest.raises(CheckpointNotFoundError, match=folder):
            _fit(root, 2, root / part, Model())
    with pytest.raises(ConfigurationError, match=r"is an export of weights alone.*folder"):
        _fit(root, 2, root / "c" / "model.safetensors", Model())
    model = Model()
    _fit(root, 3, root / "c" / "a.ckpt", model)
    with pytest.raises(ConfigurationError, match=r"^Model is sharded already"):
        _fit(root, 1, root / "c" / "a.ckpt", model)
    return problems


@pytest.mark.usefixtures("saved")
def test_another_model_or_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "c" / "model.safetensors").touch()
    for problems in on_ranks(_mismatches, 2, tmp_path):
        for optimizers, groups, shape, misspelled in (problems[:4], problems[4:]):
            assert "1 optimizers" in optimizers
            assert "'blocks.0.lower.weight'" in groups
            assert shape.startswith(f"{tmp_path}/c/a.ckpt does not fit the model. ")
            assert "Error(s) in loading state_dict for Resized:" in shape
            assert "size mismatch for scale" in shape
            assert shape.endswith("Nothing was loaded.")
            assert misspelled.startswith(
                f"{tmp_path}/c/q.ckpt: no such checkpoint; {tmp_path}/c has 'a"
            )


def _save_within_an_epoch(root: Path) -> None:
    saver = ModelCheckpoint(dirpath=root, every_n_train_steps=4, filename="b")
    trainer(root, 2, max_steps=4, callbacks=[saver]).fit(Model(), loader())


def _reworld(root: Path) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Model()
        run = trainer(root, 1, max_epochs=1)
        run.fit(model, loader(), ckpt_path=str(root / "b.ckpt"))
    told = [str(w.message) for w in caught if "was saved by 2 ranks" in str(w.message)]
    return told, len(model.losses)


def test_another_world_size_goes_on_at_the_same_place_with_a_warning(tmp_path: Path) -> None:
    on_ranks(_save_within_an_epoch, 2, tmp_path)
    told, steps = on_ranks(_reworld, 1, tmp_path)[0]
    assert len(told) == 1
    assert "resumed by 1" in told[0]
    assert steps == 12 - 8  # 4 of 6 batches of 2 ranks are 8 of 12


def _save_as_before(root: Path) -> None:
    """As an early version did on rank 1: without the generators before an epoch's first batch."""
    own = data.ResumableLoader.state_dict
    if dist.get_rank() == 1:
        data.ResumableLoader.state_dict = lambda self: {  # type: ignore[method-assign]
            key: value for key, value in own(self).items() if key != "first"
        }
    _save_within_an_epoch(root)


def _resume_from_before(root: Path) -> tuple[str, int, int]:
    path = str(root / "b.ckpt")
    model = Model()
    run = trainer(root, 2, max_epochs=1)
    with pytest.raises(FormatVersionError) as raised:
        run.fit(model, loader(), ckpt_path=path)
    seen = len(model.losses)
    run = trainer(root, 2, max_epochs=1, strategy_options={"load_module_only": True})
    run.fit(model := Model(), loader(), ckpt_path=path)
    return str(raised.value), seen, len(model.losses)


def test_a_ranks_own_state_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    on_ranks(_save_as_before, 2, tmp_path)
    for text, seen, steps in on_ranks(_resume_from_before, 2, tmp_path):
        assert f"{tmp_path}/b.ckpt: what rank 1 stored for itself" in text
        assert "loaders[0]/first: missing. Nothing was loaded. Load it with the version" in text
        assert "load_module_only=True" in text
        assert (seen, steps) == (0, 6)


def _hpc(root: Path) -> Any:
    L.seed_everything(1)
    model = Model()
    run = trainer(root, 3, max_steps=2)
    run.fit(model, loader())
    connector = run._checkpoint_connector
    for _ in range(2):
        run.save_checkpoint(connector.hpc_save_path(root))
    names = sorted(p.name for p in root.iterdir())
    seen = Probe()
    again = trainer(root, 3, max_steps=3, callbacks=[seen])
    again.fit(Model(), loader(), ckpt_path="hpc")
    return names, again._checkpoint_connector._hpc_resume_path, whole_weights(model), seen.seen


def test_hpc_checkpoints_are_numbered_and_resumed(tmp_path: Path) -> None:
    for names, path, weights, seen in on_ranks(_hpc, 2, tmp_path):
        assert names == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt", "latest"]
        assert path == str(tmp_path / "hpc_ckpt_2.ckpt")
        del weights["norm.running_mean"], weights["norm.running_var"]
        assert_same(weights, {k: seen["weights"][k] for k in weights})


def _over_a_file(root: Path) -> Any:
    """A run that moves over: the tag's name is a file of Lightning's, or a link."""
    L.seed_everything(1)
    run = trainer(root, 0, strategy="ddp", max_steps=1)
    run.fit(Model(), loader())
    run.save_checkpoint(root / "last.ckpt")
    run = trainer(root, 2, max_steps=2)
    run.fit(Model(), loader(), ckpt_path=str(root / "last.ckpt"))
    run.save_checkpoint(root / "last.ckpt")
    names = sorted(p.name for p in root.iterdir())
    run.strategy.barrier()
    if run.is_global_zero:
        (root / "link.ckpt").symlink_to("last.ckpt")
    run.strategy.barrier()
    run.save_checkpoint(root / "link.ckpt")
    return names, (root / "link.ckpt").is_symlink(), (root / "last.ckpt").is_dir()


def _over_a_file_that_stays(root: Path) -> str:
    """The file cannot be set aside, which only rank 0 finds out."""
    run = trainer(root, 2, max_steps=1, strategy_options={"save_timeout": 20.0})
    run.fit(Model(), loader())
    with pytest.raises(SaveError) as raised:
        run.save_checkpoint(root / "a.ckpt")
    return str(raised.value)


def test_a_file_that_cannot_be_set_aside_ends_the_save_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("a user's file")
    (tmp_path / "a.ckpt.replaced" / "full").mkdir(parents=True)
    told = on_ranks(_over_a_file_that_stays, 2, tmp_path)
    assert told[0] == told[1]
    assert "Is a directory" in told[0]
    assert (tmp_path / "a.ckpt").read_text() == "a user's file"


def test_a_file_or_link_at_the_tags_place_is_replaced(tmp_path: Path) -> None:
    for names, is_link, is_folder in on_ranks(_over_a_file, 2, tmp_path):
        assert names == ["last.ckpt", "latest"]
        assert not is_link
        assert is_folder
    shutil.rmtree(tmp_path / "last.ckpt")


def _fails_on_rank_1() -> tuple[str, Any]:
    def action() -> None:
        if dist.get_rank() == 1:
            raise LookupError("a device that is gone")

    with pytest.raises(ZeroCkptError) as caught:
        ZeroStrategy(stage=1)._together("resume: weights", action)
    assert type(caught.value) is ZeroCkptError  # of a load, and no SaveError
    return str(caught.value), type(caught.value.__cause__)


def test_the_rank_that_fails_shows_where() -> None:
    text = "rank 1: LookupError: a device that is gone"
    assert on_ranks(_fails_on_rank_1, 2) == [(text, type(None)), (text, LookupError)]
