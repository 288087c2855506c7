"""SIGKILL of one rank, or of all, before every single storage operation of a save.

Whatever the instant: what was committed loads bitwise, the new checkpoint is whole or absent, survivors raise and name
the dead rank, and the next save succeeds and leaves nothing behind of the crashed one.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.jobs import (
    TIMEOUT,
    Job,
    Raised,
    contents,
    files,
    raised,
    run_many,
    save_again,
    unlisted,
)
from tests.faults.team import ENGINES
from tests.workers import Outcome, Ranks, run_ranks, start_ranks
from zero_ckpt.core.control import Decide
from zero_ckpt.core.leftovers import remove_leftovers
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.recovery import rebuild
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.store_control import StoreControl
from zero_ckpt.errors import RankTimeoutError
from zero_ckpt.testing import FaultyStorage, Operation, kill_at

WORLD = 2


def save_recorded(directory: str, step: int, tag: str) -> list[tuple[str, str]]:
    storage = FaultyStorage(LocalStorage())
    Job.at(step, storage=storage).save(directory, tag=tag)
    return [(operation.name, Path(operation.path).name) for operation in storage.log]


def save_killed(directory: str, tag: str, victims: tuple[int, ...], number: int) -> Raised:
    """The first of `victims` dies at its operation `number`, and with it the others, wherever they are."""
    pids: list[int] = [0] * WORLD
    dist.all_gather_object(pids, os.getpid())

    def kill(operation: Operation) -> None:
        if operation.number == number:
            for rank in reversed(victims):
                os.kill(pids[rank], signal.SIGKILL)

    hook = kill if dist.get_rank() == victims[0] else ignore
    return raised(Job.at(2, storage=FaultyStorage(LocalStorage(), hook)).save, directory, tag=tag)


def ignore(_: Operation) -> None:
    pass


@dataclass(frozen=True)
class Scenario:
    """A directory with step 1 committed, and a save of step 2 as `tag`, recorded in full by rank."""

    start: Path
    tag: str
    logs: list[list[tuple[str, str]]]
    old: dict[str, str]
    new: dict[str, str]

    @property
    def commit(self) -> int:
        """The number of rank 0's operation that commits."""
        return self.logs[0].index(("put", "manifest.json"))


@pytest.fixture(scope="module", params=["new tag", "overwrite"])
def scenario(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    root = tmp_path_factory.mktemp("crash")
    tag = "step1" if request.param == "overwrite" else "step2"
    run_ranks(save_recorded, WORLD, str(root / "start"), 1, "step1")
    old = contents(root / "start", "step1")
    shutil.copytree(root / "start", root / "clean")
    logs = run_ranks(save_recorded, WORLD, str(root / "clean"), 2, tag)
    return Scenario(root / "start", tag, logs, old, contents(root / "clean", tag))


@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=["rank 0", "rank 1", "all ranks"])
def test_a_kill_at_any_operation_of_a_save_leaves_whole_checkpoints(
    scenario: Scenario, victims: tuple[int, ...], tmp_path: Path
) -> None:
    count = len(scenario.logs[victims[0]])
    assert count > 12
    directories = [tmp_path / str(number) for number in range(count)]
    starts: list[Callable[[], Ranks]] = []
    for number, directory in enumerate(directories):
        shutil.copytree(scenario.start, directory)
        args = (str(directory), scenario.tag, victims, number)
        starts.append(partial(start_ranks, save_killed, WORLD, *args))
    for number, outcomes in enumerate(run_many(starts)):
        committed = 0 in victims and number > scenario.commit
        _check_survivors(outcomes, victims, committed)
        _check_disk(scenario, directories[number], committed)
        _check_cleaned(scenario, directories[number], committed)
    run_ranks(save_again, WORLD, [str(directory) for directory in directories], scenario.tag)
    for directory in directories:
        assert unlisted(directory, scenario.tag) == []
        assert not [name for name in files(directory) if name.endswith(".tmp")]
        assert (directory / "latest").read_text() == f"{scenario.tag}\n"


def _check_survivors(outcomes: list[Outcome], victims: tuple[int, ...], committed: bool) -> None:
    for outcome in outcomes:
        if outcome.rank in victims:
            assert outcome.exit_code == -signal.SIGKILL, outcome.describe()
            continue
        assert outcome.status == "returned", outcome.describe()
        error = outcome.value
        assert error.kind == "RankTimeoutError"
        assert f"rank {victims[0]} died" in error.text
        if not committed:
            assert "is not known" in error.text or "Nothing was committed" in error.text
        else:
            assert "Nothing was committed" not in error.text


def _check_disk(scenario: Scenario, directory: Path, committed: bool) -> None:
    """Old and new are both whole, each where it should be; what `latest` names is one of them."""
    if committed:
        assert contents(directory, scenario.tag) == scenario.new
    else:
        assert contents(directory, "step1") == scenario.old
    if scenario.tag != "step1":
        assert contents(directory, "step1") == scenario.old
    assert contents(directory) in (scenario.old, scenario.new)


def _check_cleaned(scenario: Scenario, directory: Path, committed: bool) -> None:
    """`zero-ckpt clean` takes nothing that is whole, and leaves nothing else."""
    cleaned = directory.with_name(f"{directory.name} cleaned")
    shutil.copytree(directory, cleaned)
    found = remove_leftovers(LocalStorage(), str(cleaned))
    _check_disk(scenario, cleaned, committed)
    for tag in (path.name for path in cleaned.iterdir() if path.is_dir()):
        if not (cleaned / tag / "manifest.json").exists():
            assert [leftover.tag for leftover in found if leftover.kept] == [tag]
            rebuild(LocalStorage(), str(cleaned / tag))
        else:
            assert unlisted(cleaned, tag) == []
    assert not [name for name in files(cleaned) if name.startswith(".saving-")]


def die_before_save(directory: str) -> Raised:
    job = Job.at(1)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return raised(job.save, directory)


def test_a_rank_that_died_before_its_first_save_is_known_to_be_dead(tmp_path: Path) -> None:
    with start_ranks(die_before_save, WORLD, str(tmp_path)) as ranks:
        survivor, victim = ranks.wait(timeout=30)
    assert victim.exit_code == -signal.SIGKILL
    assert survivor.status == "returned", survivor.describe()
    assert survivor.value.text.startswith("save: agree: rank 1 died. ")
    assert files(tmp_path) == []


# A rank that dies around a meeting, when the ranks hold different tensors


def save_own(directory: str, step: int, engine: str = "sync") -> str:
    """Each rank has a tensor of its own, so that the ranks also exchange tables."""
    rank = dist.get_rank()
    tensor = torch.full((4, 4), float(step))
    snapshot = Snapshot(
        model={"shared": tensor, f"own{rank}": tensor + rank}, objects={"step": step}
    )
    saving = ENGINES[engine]().save(
        directory, f"step{step}", snapshot, step=step, zero_stage=0, timeout=TIMEOUT
    )
    saving.wait()
    return str(saving.path)


def die_in_meeting(phase: str, when: str, victim: int, call: Callable[[], str]) -> Raised | str:
    meet = StoreControl.meet

    def deadly(
        self: StoreControl, called: str, record: bytes, decide: Decide, timeout: float
    ) -> bytes:
        doomed = called == phase and self.rank == victim
        if doomed and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)

        def decide_and_die(records: list[bytes]) -> bytes:
            decide(records)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        answer = meet(self, called, record, decide_and_die if doomed else decide, timeout)
        if doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    StoreControl.meet = deadly  # type: ignore[method-assign]
    try:
        return call()
    except RankTimeoutError as error:
        return Raised(type(error).__name__, str(error))


def save_dying(directory: str, engine: str, *death: Any) -> Raised | str:
    return die_in_meeting(*death, lambda: save_own(directory, 2, engine))


PHASES = ["save: agree", "save: tables", "save: vote"]
CASES = [(p, w, v) for p in PHASES for w in ("before", "after") for v in (0, 1)]


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_kill_around_any_meeting_of_a_save(engine: str, tmp_path: Path) -> None:
    """`after` is, for rank 0, when it has decided and not yet answered; for others, when they have the answer."""
    start = tmp_path / "start"
    run_ranks(save_own, WORLD, str(start), 1)
    old = contents(start)
    directories = [tmp_path / str(number) for number in range(len(CASES))]
    starts: list[Callable[[], Ranks]] = []
    for directory, case in zip(directories, CASES, strict=True):
        shutil.copytree(start, directory)
        starts.append(partial(start_ranks, save_dying, WORLD, str(directory), engine, *case))
    results = zip(CASES, directories, run_many(starts), strict=True)
    for (phase, when, victim), directory, outcomes in results:
        survivor = outcomes[1 - victim]
        assert outcomes[victim].exit_code == -signal.SIGKILL
        assert survivor.status == "returned", survivor.describe()
        committed = (phase, when) == ("save: vote", "after")
        if committed and victim == 1:
            assert survivor.value == f"{directory}/step2"
        else:
            assert f"rank {victim} died" in survivor.value.text
            assert ("Nothing was committed" in survivor.value.text) is not committed
        assert contents(directory, "step1") == old
        if not committed:
            assert contents(directory) == old
            # The files of a dead rank 0 stay until the next save of their tag.
            assert victim == 0 or sorted(os.listdir(directory)) == ["latest", "step1"]
        else:
            assert contents(directory, "step2") != old
            assert unlisted(directory, "step2") == []


# Loads


def load_recorded(directory: str) -> int:
    storage = FaultyStorage(LocalStorage(), names={"open", "read"})
    Job.at(2, storage=storage).load(directory)
    return len(storage.log)


def load_killed(directory: str, number: int, victim: int) -> tuple[Raised, bool]:
    hook = kill_at(number) if dist.get_rank() == victim else ignore
    storage = FaultyStorage(LocalStorage(), hook, names={"open", "read"})
    job = Job.at(2, storage=storage)
    before = job.bits()
    error = raised(job.load, directory)
    return error, job.bits() == before


def save_step(directory: str) -> None:
    Job.at(1).save(directory)


def test_a_kill_at_reads_all_through_a_load(tmp_path: Path) -> None:
    run_ranks(save_step, WORLD, str(tmp_path))
    count = min(run_ranks(load_recorded, WORLD, str(tmp_path)))
    assert count > 8
    numbers = [*range(0, count - 1, 3), count - 1]
    victims = [index % 2 for index in range(len(numbers))]
    starts: list[Callable[[], Ranks]] = [
        partial(start_ranks, load_killed, WORLD, str(tmp_path), *case)
        for case in zip(numbers, victims, strict=True)
    ]
    seen = set()
    for victim, outcomes in zip(victims, run_many(starts), strict=True):
        survivor = outcomes[1 - victim]
        assert outcomes[victim].exit_code == -signal.SIGKILL
        assert survivor.status == "returned", survivor.describe()
        error, untouched = survivor.value
        assert error.kind == "RankTimeoutError"
        assert f"rank {victim} died" in error.text
        told = "untouched" if "Nothing was loaded" in error.text else "in part"
        assert untouched or told == "in part"
        assert ("OVERWRITTEN IN PART" in error.text) is (told == "in part")
        seen.add(told)
    assert seen == {"untouched", "in part"}


def load_dying(directory: str, *death: Any) -> tuple[Raised | str, bool]:
    job = Job.at(2)
    before = job.bits()
    found = die_in_meeting(*death, lambda: job.load(directory))
    return found, job.bits() == before


LOAD_PHASES = ["load: open", "load: planned", "load: verified", "load: done"]


@pytest.mark.slow
def test_a_kill_around_any_meeting_of_a_load(tmp_path: Path) -> None:
    """`after` is what it is for a save. Whoever survives changed nothing, or says that it did, or has loaded all."""
    run_ranks(save_step, WORLD, str(tmp_path))
    cases = [(p, w, v) for p in LOAD_PHASES for w in ("before", "after") for v in (0, 1)]
    starts: list[Callable[[], Ranks]] = [
        partial(start_ranks, load_dying, WORLD, str(tmp_path), *case) for case in cases
    ]
    for case, outcomes in zip(cases, run_many(starts), strict=True):
        phase, when, victim = case
        survivor = outcomes[1 - victim]
        assert outcomes[victim].exit_code == -signal.SIGKILL
        assert survivor.status == "returned", (case, survivor.describe())
        found, untouched = survivor.value
        if case == ("load: done", "after", 1):
            assert found == "step1"
            continue
        assert isinstance(found, Raised), case
        # Who has its answer dies before the next meeting.
        answered = when == "after" and victim == 1
        last = LOAD_PHASES[LOAD_PHASES.index(phase) + answered]
        assert found.text.startswith(f"{last}: rank {victim} died. "), (case, found)
        assert untouched is (last != "load: done"), case
        assert ("OVERWRITTEN IN PART" in found.text) is (last == "load: done"), case
        assert ("Nothing was loaded" in found.text) is untouched, case
