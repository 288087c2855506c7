"""Power failures at any moment of a save by two ranks: the old checkpoint or the new one loads, whole and bitwise.

The ranks are threads here, so that one journal orders the calls of both.
"""

from __future__ import annotations

import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.jobs import contents
from tests.faults.power import Disk, Journal, journaled, restore
from tests.faults.team import Team
from zero_ckpt.core import local_storage as storage
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import ZeroCkptError

WORLD = 2
DRAWS = 5
"""Power failures at each moment: which unsynced changes reached the disk is drawn each time."""


def save(directory: Path, tag: str, step: int, keep_last: int | None = None) -> None:
    team = Team(WORLD, LocalStorage())
    assert team.save(directory, tag, step, keep_last=keep_last) == [None] * WORLD


@dataclass(frozen=True)
class Scenario:
    """A journaled save on a directory that holds `old`."""

    journal: Journal
    old: dict[str, str]
    new: dict[str, str]
    tag: str


def record(tmp_path: Path, scenario: str) -> Scenario:
    directory = tmp_path / "checkpoints"
    tag = "old" if scenario == "overwrite" else "new"
    save(directory, "old", 1)
    old = contents(directory, "old")
    with journaled(directory) as journal:
        save(directory, tag, 2, keep_last=1 if scenario == "new tag, old removed" else None)
    return Scenario(journal, old, contents(directory, tag), tag)


def wrong(scenario: Scenario, number: int, moment: Disk, folder: Path) -> list[str]:
    """What a power failure at `moment` broke, for every draw of what reached the disk."""
    broken = []
    for draw in range(DRAWS):
        found = moment.after_crash(random.Random(f"{number} {draw}"), scenario.journal.root)
        target = folder / f"{number}-{draw}"
        restore(found, target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fallback, which is what is wanted here
            try:
                state = contents(target)
            except ZeroCkptError as error:
                broken.append(f"moment {number}: {error}")
                continue
        if state not in (scenario.old, scenario.new):
            broken.append(f"moment {number}: neither the old nor the new state")
        shutil.rmtree(target)
    return broken


SCENARIOS = ["new tag", "overwrite", "new tag, old removed"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_failure_at_any_moment_leaves_the_old_or_the_new_checkpoint(
    name: str, tmp_path: Path
) -> None:
    scenario = record(tmp_path, name)
    moments = scenario.journal.moments
    assert len(moments) > 30
    broken = [
        text
        for number, moment in enumerate(moments)
        for text in wrong(scenario, number, moment, tmp_path / "after")
    ]
    assert broken == []
    # When the save has returned, nothing but the new state may come back.
    final = wrong(
        Scenario(scenario.journal, scenario.new, scenario.new, scenario.tag),
        len(moments),
        moments[-1],
        tmp_path / "after",
    )
    assert final == []


@pytest.mark.parametrize("skipped", ["files", "folders"])
def test_the_journal_sees_what_was_not_synced(
    skipped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same save without its syncs of files, or of folders, does not survive: so the test above can fail."""
    sync = Journal.fsync

    def forgetful(self: Journal, fd: int) -> None:
        is_folder = self._names.get(self._open[fd]) is None
        if is_folder is (skipped != "folders"):
            sync(self, fd)

    monkeypatch.setattr(Journal, "fsync", forgetful)
    scenario = record(tmp_path, "overwrite")
    assert any(
        wrong(scenario, number, moment, tmp_path / "after")
        for number, moment in enumerate(scenario.journal.moments)
    )


def test_the_storage_is_put_back(tmp_path: Path) -> None:
    import os

    with journaled(tmp_path):
        assert storage.os is not os
    assert storage.os is os
    assert storage.shutil is shutil
