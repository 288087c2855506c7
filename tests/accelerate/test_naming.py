"""Automatic checkpoint naming: folders, the limit, the numbers after a resume."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import ProjectConfiguration

from tests.accelerate.harness import assert_same, batches, make, on_ranks, state_of, train
from zero_ckpt.accelerate import detach
from zero_ckpt.accelerate.naming import (
    candidates,
    directory_for_save,
    is_accelerates,
    next_iteration,
    retire,
)
from zero_ckpt.errors import CheckpointNotFoundError, SaveError
from zero_ckpt.testing import FaultyStorage, fail_at


def named(root: str, *, seed: int = 0, limit: int | None = None, **options: Any) -> Any:
    config = ProjectConfiguration(
        project_dir=root, automatic_checkpoint_naming=True, total_limit=limit
    )
    return make(seed=seed, project_config=config, **options)


def test_each_save_is_a_numbered_folder_and_nothing_else_appears(tmp_path: Path) -> None:
    on_ranks(numbered, 2, str(tmp_path))
    assert os.listdir(tmp_path) == ["checkpoints"]
    folders = sorted(os.listdir(tmp_path / "checkpoints"))
    assert folders == ["checkpoint_0", "checkpoint_1"]
    inside = [sorted(os.listdir(tmp_path / "checkpoints" / f)) for f in folders]
    assert inside == [["global_step1", "latest"], ["global_step2", "latest"]]


def numbered(root: str) -> None:
    made = named(root)
    for i in range(2):
        train(made, batches(1))
        path = made[0].save_state("ignored, as Accelerate does")
        assert path == Path(root, "checkpoints", f"checkpoint_{i}")
    assert made[0].save_iteration == 2


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    before = on_ranks(first_run, 2, str(tmp_path))
    after = on_ranks(second_run, 2, str(tmp_path))
    assert_same(before, after)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"checkpoint_{i}" for i in (1, 2, 3)]


def first_run(root: str) -> Any:
    made = named(root)
    for _ in range(3):
        train(made, batches(1))
        made[0].save_state()
    return state_of(made)


def second_run(root: str) -> Any:
    made = named(root, seed=3, limit=3)
    made[0].load_state()
    assert made[0].save_iteration == 3
    loaded = state_of(made)
    made[0].save_state()
    return loaded


def test_saving_over_a_checkpoint_is_accelerates_error(tmp_path: Path) -> None:
    on_ranks(over, 2, str(tmp_path))


def over(root: str) -> None:
    named(root)[0].save_state()
    second = named(root)[0]
    with pytest.raises(ValueError, match=r"already exists\. Please manually override"):
        second.save_state()
    second.project_configuration.iteration = 1
    second.save_state()
    # A branch from an older one does not meet the newer ones.
    second.load_state(f"{root}/checkpoints/checkpoint_0")
    assert second.save_iteration == 2


def test_the_limit_removes_only_after_the_commit(tmp_path: Path) -> None:
    on_ranks(limited, 2, str(tmp_path))


def limited(root: str) -> None:
    made = named(root, limit=1)
    accelerator = made[0]
    folder = Path(root, "checkpoints")
    accelerator.save_state()
    assert os.listdir(folder) == ["checkpoint_0"]

    storage = accelerator.zero_engine.storage
    accelerator.zero_engine.storage = FaultyStorage(storage, fail_at(0, errno.EIO), names={"put"})
    train(made, batches(1))
    with pytest.raises(SaveError):
        accelerator.save_state()
    accelerator.zero_engine.storage = storage
    fresh = named(root, seed=2)
    fresh[0].load_state()
    assert fresh[0]._zero_step == 0

    accelerator.save_state()  # the number that failed, again
    accelerator.wait_for_everyone()
    assert os.listdir(folder) == ["checkpoint_1"]
    made[0].load_state()
    assert accelerator.save_iteration == 2


def test_the_newest_that_is_whole_is_loaded(tmp_path: Path) -> None:
    on_ranks(damaged, 2, str(tmp_path))


def damaged(root: str) -> None:
    made = named(root)
    for _ in range(3):
        train(made, batches(1))
        made[0].save_state()
    folder = Path(root, "checkpoints")
    if made[0].is_main_process:
        shard = next(folder.glob("checkpoint_2/global_step3/model-00000*"))
        data = bytearray(shard.read_bytes())
        data[4100] ^= 1
        shard.write_bytes(data)
        (folder / "checkpoint_9").mkdir()
        (folder / "notes.txt").write_text("not a checkpoint")
    made[0].wait_for_everyone()
    fresh = named(root, seed=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fresh[0].load_state()
    assert fresh[0]._zero_step == 2
    texts = [str(each.message) for each in told]
    found = any("falling back to an older checkpoint" in text for text in texts)
    assert found is made[0].is_main_process
    assert fresh[0].save_iteration == 10


def test_without_any_checkpoint_the_folder_is_named(tmp_path: Path) -> None:
    on_ranks(none_there, 1, str(tmp_path))


def none_there(root: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="checkpoints: no committed checkpoint"):
        named(root)[0].load_state()


def test_folders_of_accelerate_count_too(tmp_path: Path) -> None:
    on_ranks(mixed, 1, str(tmp_path))


def mixed(root: str) -> None:
    made = named(root)
    plain = made[0]
    train(made, batches(2))
    detach(plain).save_state()
    fresh = named(root, seed=1)
    fresh[0].load_state()
    assert fresh[0].save_iteration == 1
    assert_same(fresh[1].state_dict(), made[1].state_dict())
    fresh[0].project_configuration.total_limit = 1
    fresh[0].save_state()
    assert os.listdir(Path(root, "checkpoints")) == ["checkpoint_1"]


def test_whose_folder_it_is(tmp_path: Path) -> None:
    assert not is_accelerates(str(tmp_path))  # the core says that nothing was saved there
    (tmp_path / "random_states_0.pkl").touch()
    assert is_accelerates(str(tmp_path))
    (tmp_path / "pytorch_model").mkdir()
    (tmp_path / "pytorch_model" / "model-00000-of-00001.safetensors").touch()
    assert not is_accelerates(str(tmp_path))  # nothing that Accelerate would find, a tag that we do
    (tmp_path / "model.safetensors").touch()
    assert is_accelerates(str(tmp_path))
    (tmp_path / "pytorch_model" / "manifest.json").touch()
    assert not is_accelerates(str(tmp_path))
    assert not is_accelerates(str(tmp_path / "pytorch_model"))


def test_rules_for_folders(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert next_iteration(f"{root}/none") == 0
    with pytest.raises(CheckpointNotFoundError):
        list(candidates(root))
    for number in (2, 10, 30):
        folder = tmp_path / f"checkpoint_{number}"
        folder.mkdir()
        (folder / "random_states_0.pkl").touch()
    (tmp_path / "checkpoint_20").mkdir()
    (tmp_path / "checkpoint_x").mkdir()
    assert next_iteration(root) == 31
    assert [os.path.basename(path) for path in candidates(root)] == [
        "checkpoint_30",
        "checkpoint_10",
        "checkpoint_2",
    ]
    assert directory_for_save(root, 20) == f"{root}/checkpoint_20"
    with pytest.raises(ValueError, match="already exists"):
        directory_for_save(root, 10)
    assert retire(root, 5, f"{root}/checkpoint_30") == ""
    assert retire(root, 2, f"{root}/checkpoint_30") == ""
    assert sorted(os.listdir(root)) == [
        "checkpoint_10",
        "checkpoint_20",
        "checkpoint_30",
        "checkpoint_x",
    ]
