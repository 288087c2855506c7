"""Every state that a power failure may leave of a recorded save: opened, it is the old or the new checkpoint, whole.

Exhaustive for the small case: every subset of the names that were not synced, at every moment; and of every file that
a surviving manifest lists, every content that it may have. Files that no manifest lists are never opened (which is
checked), so what they hold cannot matter. Larger saves are sampled, everything included; the seed is printed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping

import pytest

from tests.faults.jobs import contents, printed_dice
from tests.faults.team import ENGINES, Team
from zero_ckpt.errors import ZeroCkptError
from zero_ckpt.testing import FaultyStorage, RecordingStorage
from zero_ckpt.testing.recording import Inode, Moment

ROOT = "/run"

Digests = dict[str, str]
Files = dict[str, bytes]

SCENARIOS = {
    "new tag": {"tag": "new"},
    "overwrite": {"tag": "old"},
    "new tag, old removed": {"tag": "new", "keep_last": 1},
}


class Recorded:
    """A save of step 2 on a storage that holds step 1 as `old`, and what is to be found afterwards."""

    def __init__(self, storage: RecordingStorage, engine: str, world_size: int, **options: object):
        team = Team(world_size, storage, engine)
        assert team.save(ROOT, "old", 1) == [None] * world_size
        self.old = contents(ROOT, storage=storage)
        storage.moments.clear()
        assert team.save(ROOT, str(options.pop("tag")), 2, **options) == [None] * world_size
        self.new = contents(ROOT, storage=storage)
        self.moments = storage.moments

    def wrong(self, files: Mapping[str, bytes], allowed: list[Digests]) -> str:
        """What is wrong with this disk, or ""."""
        disk = FaultyStorage(RecordingStorage(files), names={"open"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fallback, which is what is wanted here
            try:
                found = contents(ROOT, storage=disk)
            except ZeroCkptError as error:
                return str(error)
        strangers = {operation.path for operation in disk.log} - set(listed(files))
        if strangers:
            return f"files that no manifest lists were opened: {sorted(strangers)}"
        return "" if found in allowed else "neither the old nor the new state"


def listed(files: Mapping[str, bytes]) -> Iterator[str]:
    """The shard files that the manifests on this disk list."""
    for path, data in files.items():
        if path.endswith("/manifest.json"):
            body = json.loads(data[data.index(b"\n") : -3])
            yield from (f"{os.path.dirname(path)}/{name}" for name in body["files"])


def every_disk(moment: Moment) -> Iterator[Files]:
    """All that matters: of a file that nobody lists, one content stands for all."""
    for named in moment.name_states():
        fixed = {path: inode.durable for path, inode in named.items()}
        watched = [path for path in listed(fixed) if path in named]
        for states in itertools.product(*(distinct_states(named[path]) for path in watched)):
            yield fixed | dict(zip(watched, states, strict=True))


def distinct_states(inode: Inode) -> list[bytes]:
    return list(dict.fromkeys(inode.states()))


def broken_states(recorded: Recorded) -> tuple[int, list[str]]:
    """The number of distinct disks, and what is wrong with them."""
    seen: dict[int, str] = {}
    broken = []
    for number, moment in enumerate(recorded.moments):
        is_last = number == len(recorded.moments) - 1
        allowed = [recorded.new] if is_last else [recorded.old, recorded.new]
        for files in every_disk(moment):
            key = hash((frozenset(files.items()), is_last))
            if key not in seen:
                seen[key] = recorded.wrong(files, allowed)
                if seen[key]:
                    broken.append(f"moment {number}, {moment.operation}: {seen[key]}")
    return len(seen), broken


@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_state_of_a_small_save_is_the_old_or_the_new_checkpoint(
    name: str, engine: str
) -> None:
    recorded = Recorded(RecordingStorage(), engine, 2, **SCENARIOS[name])
    count, broken = broken_states(recorded)
    assert broken == []
    assert count > 20


class NeverSyncsFolders(RecordingStorage):
    def sync(self, path: str) -> None:
        pass


class NeverSyncsFiles(RecordingStorage):
    def settle(self, path: str, number: int, nbytes: int) -> None:
        content = self._state.files[number].content[:nbytes]
        self._state.files[number] = Inode(b"", ((0, content),))


@pytest.mark.parametrize("storage", [NeverSyncsFolders, NeverSyncsFiles])
def test_a_save_that_does_not_sync_is_found_out(storage: type[RecordingStorage]) -> None:
    """So the tests here can fail."""
    recorded = Recorded(storage(), "sync", 1, tag="old")
    assert broken_states(recorded)[1]


def sampled_wrong(recorded: Recorded, dice: random.Random, draws: int) -> list[str]:
    broken = []
    for _ in range(draws):
        number = dice.randrange(len(recorded.moments))
        files = recorded.moments[number].sample(dice)
        text = recorded.wrong(files, [recorded.old, recorded.new])
        broken += [f"moment {number}: {text}"] if text else []
    return broken


@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize(
    "draws", [60, pytest.param(5_000, marks=[pytest.mark.torture, pytest.mark.timeout(3600)])]
)
@pytest.mark.parametrize("name", SCENARIOS)
def test_sampled_states_of_a_larger_save(name: str, draws: int, engine: str) -> None:
    recorded = Recorded(RecordingStorage(), engine, 4, **SCENARIOS[name])
    assert sampled_wrong(recorded, printed_dice(), draws) == []
