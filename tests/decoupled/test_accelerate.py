"""Under Accelerate a save beside the training leaves what a save in it leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file

from tests.accelerate.harness import Net, assert_same, batches, make, on_ranks, state_of, train
from tests.decoupled.jobs import storage
from zero_ckpt.accelerate import detach
from zero_ckpt.errors import SaveError


def _save_and_train_on(out: str, kind: Any) -> bool:
    made = make(kind, async_save=True)
    train(made, batches(2))
    before = state_of(made)
    made[0].save_state(out, client_state={"epoch": 1})
    train(made, batches(2, 2))
    client_state = made[0].load_state(out)
    assert_same(state_of(made), before)
    train(made, batches(1))
    made[0].save_state(out)
    made[0].end_training()
    return bool(client_state == {"epoch": 1})


@pytest.mark.parametrize("kind", ["plain", 1, 3])
def test_it_holds_what_was_there_when_it_was_asked_for(kind: Any, tmp_path: Path) -> None:
    assert on_ranks(_save_and_train_on, 2, str(tmp_path), kind) == [True, True]
    Net().load_state_dict(load_file(tmp_path / "fp32" / "model.safetensors"), strict=True)


def _limited(root: str, fails: bool) -> None:
    config = ProjectConfiguration(project_dir=root, automatic_checkpoint_naming=True, total_limit=1)
    made = make(2, project_config=config, async_save=True, export=False)

    def hook(operation: Any) -> None:
        if fails and "checkpoint_1" in operation.path:
            raise OSError(28, "No space left on device", operation.path)

    made[0].zero_engine.storage = storage(hook, "finish")
    for start in range(2):
        train(made, batches(1, start))
        made[0].save_state()
    if fails:
        with pytest.raises(SaveError, match="No space left"):
            made[0].end_training()
    else:
        made[0].end_training()


@pytest.mark.parametrize("fails", [False, True])
def test_older_checkpoints_go_when_the_new_one_is_committed(tmp_path: Path, fails: bool) -> None:
    on_ranks(_limited, 2, str(tmp_path), fails)
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == (["checkpoint_0", "checkpoint_1"] if fails else ["checkpoint_1"])
    committed = [name for name in names if (tmp_path / "checkpoints" / name / "latest").exists()]
    assert committed == (["checkpoint_0"] if fails else ["checkpoint_1"])


def _detached_after_a_failure(root: str) -> None:
    made = make(0, async_save=True)

    def fail(operation: Any) -> None:
        raise OSError(28, "No space left on device", operation.path)

    made[0].zero_engine.storage = storage(fail, "finish")
    made[0].save_state(root)
    with pytest.raises(SaveError, match="No space left"):
        detach(made[0])
    assert type(made[0]) is Accelerator


def test_a_failed_save_does_not_keep_an_accelerator_attached(tmp_path: Path) -> None:
    on_ranks(_detached_after_a_failure, 1, str(tmp_path))
