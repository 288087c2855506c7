"""A training run that is killed at random and starts itself again: no checkpoint is lost or torn, nothing hangs, and
every loss, whenever it was computed, is bitwise that of the run which nobody killed.

The seed is printed (`ZERO_CKPT_SEED`). The long form kills a thousand times.
"""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.jobs import contents, printed_dice
from tests.faults.training import STEPS, read_committed, read_losses, train
from tests.workers import Ranks, run_ranks, start_ranks

WORLD = 2


@dataclass
class Run:
    """A run's directory and its ranks' logs, and what is true of the run that nobody killed."""

    root: Path
    engine: str
    losses: dict[tuple[str, str], set[str]]
    states: dict[str, dict[str, str]]

    def __post_init__(self) -> None:
        self.logs.mkdir(parents=True)

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def directory(self) -> Path:
        return self.root / "checkpoints"

    def start(self) -> Ranks:
        return start_ranks(train, WORLD, str(self.directory), str(self.logs), self.engine, 2)

    def check(self) -> None:
        """What is committed is whole and right, and no older than anybody was told."""
        tags = [path.parent.name for path in self.directory.glob("*/manifest.json")]
        for tag in tags:
            assert contents(self.directory, tag) == self.states[tag], tag
        newest = max((int(tag.removeprefix("global_step")) for tag in tags), default=0)
        assert newest >= read_committed(self.logs)
        if tags:
            with warnings.catch_warnings():
                # A kill between the first commit and `latest` leaves none.
                warnings.filterwarnings("ignore", "falling back to .*latest is missing")
                assert contents(self.directory) in [self.states[tag] for tag in tags]
        for where, losses in read_losses(self.logs).items():
            assert losses == self.losses[where], where


def kill_somewhere(ranks: Ranks, run: Run, dice: random.Random) -> bool:
    """Kill one rank or all, some lines of the log from now; False when they were done by then."""
    victims = dice.choice([[0], [1], [0, 1]])
    size, lines = log_lines(run), dice.randrange(10)
    deadline = time.monotonic() + 60
    while log_lines(run) < size + lines and read_committed(run.logs) < STEPS:
        assert time.monotonic() < deadline, "the run has stopped"
        time.sleep(0.002)
    time.sleep(dice.random() * (0.02 if lines else 0.3))
    for rank in victims:
        os.kill(ranks.pids[rank], signal.SIGKILL)
    outcomes = ranks.wait(timeout=40)
    for outcome in outcomes:
        assert outcome.status != "hung", outcome.describe()
    return any(outcome.exit_code == -signal.SIGKILL for outcome in outcomes)


def log_lines(run: Run) -> int:
    return sum(path.read_bytes().count(b"\n") for path in run.logs.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sync", "async"])
@pytest.mark.parametrize(
    "kills", [3, pytest.param(500, marks=[pytest.mark.torture, pytest.mark.timeout(7200)])]
)
def test_a_training_that_is_killed_again_and_again(kills: int, engine: str, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", engine, {}, {})
    run_ranks(train, WORLD, str(whole.directory), str(whole.logs), engine, None)
    losses = read_losses(whole.logs)
    assert len(losses) == WORLD * STEPS
    states = {
        path.name: contents(whole.directory, path.name) for path in whole.directory.glob("g*")
    }
    dice, done, number = printed_dice(), 0, 0
    while done < kills:
        run = Run(tmp_path / str(number), engine, losses, states)
        number += 1
        while done < kills and read_committed(run.logs) < STEPS:
            done += kill_somewhere(run.start(), run, dice)
            run.check()
        run_ranks(train, WORLD, str(run.directory), str(run.logs), engine, 2)
        run.check()
        assert read_losses(run.logs) == losses
        assert read_committed(run.logs) == STEPS
