"""A checkpoint that holds a pickle made to run code: through no door does it run, until a caller asks for pickles."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.jobs import Job, contents
from zero_ckpt import get_fp32_state_dict_from_zero_checkpoint, load_checkpoint
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import UnsafeObjectError


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A checkpoint directory; `ran`, beside it, is made by the pickle inside."""
    state = {"deep": [{"bait": Bait(tmp_path / "ran")}]}
    with pytest.warns(UserWarning, match="stored as pickles: 'client_state/deep/0/bait'"):
        Job.at(1).checkpointer.save_checkpoint(tmp_path / "checkpoints", "tag", client_state=state)
    assert not (tmp_path / "ran").exists()
    return tmp_path / "checkpoints"


def test_no_door_runs_code(trap: Path) -> None:
    job = Job.at(2)
    before = job.bits()
    for door in (
        lambda: job.load(trap),
        lambda: load_checkpoint(trap, job.model),
        lambda: open_checkpoint(trap).objects(),
        lambda: contents(trap),
    ):
        with pytest.raises(
            UnsafeObjectError, match=r"'client_state/deep/0/bait' is a pickled .*Bait"
        ):
            door()
    assert job.bits() == before
    assert get_fp32_state_dict_from_zero_checkpoint(trap)
    assert not (trap.parent / "ran").exists()


@pytest.mark.parametrize("command", ["ls", "inspect", "verify"])
def test_no_command_runs_code(command: str, trap: Path) -> None:
    target = trap if command == "ls" else trap / "tag"
    done = subprocess.run(
        [sys.executable, "-m", "zero_ckpt", command, str(target)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not (trap.parent / "ran").exists()


def test_the_bait_runs_where_pickles_are_asked_for(trap: Path) -> None:
    """So that the tests above can fail."""
    Job.at(0).checkpointer.load_checkpoint(trap, weights_only=False)
    assert (trap.parent / "ran").exists()
