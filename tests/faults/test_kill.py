"""SIGKILL of one rank, or of all, at every system call of a save that touches files.

What `test_crash` shows between the storage's operations is shown here within them: strace kills on entry of a call.
The short form draws some of the calls; the seed is printed (`ZERO_CKPT_SEED`). Where strace cannot attach, only
`test_crash` is left.
"""

from __future__ import annotations

import copy
import os
import select
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.faults import strace
from tests.faults.jobs import (
    Job,
    Raised,
    contents,
    files,
    printed_dice,
    run_many,
    save_again,
    step_saved,
    unlisted,
)
from tests.faults.strace import Call
from tests.workers import Outcome, Ranks, run_ranks, start_ranks
from zero_ckpt.core import lease

WORLD = 2

Victims = tuple[int, ...]

FOLDERS = ("", "step1", "step2")

VICTIMS: list[Victims] = [(0,), (1,), (0, 1)]


def save_recorded(directory: str, tag: str, engine: str, logs: str) -> str:
    """Why this rank could not be traced, or ""."""
    job = Job.at(2, engine=engine)
    why_not = strace.record(f"{logs}/{dist.get_rank()}")
    dist.barrier()
    if not why_not:
        save(job, directory, tag)
    return why_not


def save_killed(
    directory: str, tag: str, engine: str, victims: Victims, call: Call
) -> Raised | None:
    """The first of `victims` dies at this call, and the others as soon as they see that."""
    job = Job.at(2, engine=engine)
    pids: list[int] = [0] * WORLD
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == victims[0]:
        strace.kill_at(_as_here(call), directory)
    elif dist.get_rank() in victims:
        threading.Thread(target=die_with, args=(pids[victims[0]],), daemon=True).start()
    try:
        save(job, directory, tag)
    except Exception as error:
        return Raised(type(error).__name__, str(error))
    return None


def _as_here(call: Call) -> Call:
    """Leases are named anew in each process: the one that this process is about to make."""
    if not call.path.startswith(lease.PREFIX):
        return call
    number = next(copy.copy(lease._numbers))
    ending = ".tmp" if call.path.endswith(".tmp") else ""
    return replace(call, path=f"{lease._own_prefix()}{number}{ending}")


def die_with(pid: int) -> None:
    select.select([os.pidfd_open(pid)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def save(job: Job, directory: str, tag: str) -> None:
    job.save(directory, tag=tag)
    job.checkpointer.wait()


@dataclass(frozen=True)
class Scenario:
    """A directory with step 1 committed, and a save of step 2 as `tag`: its calls by rank, the state it leaves."""

    start: Path
    tag: str
    engine: str
    calls: list[list[Call]]
    old: dict[str, str]
    new: dict[str, str]

    def kills(self) -> list[tuple[Victims, Call]]:
        return [(victims, call) for victims in VICTIMS for call in self.calls[victims[0]]]


@pytest.fixture(
    scope="module",
    params=[(tag, engine) for tag in ("step2", "step1") for engine in ("sync", "async")],
    ids=["new tag", "new tag, async", "overwrite", "overwrite, async"],
)
def scenario(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    root, (tag, engine) = tmp_path_factory.mktemp("kill"), request.param
    start, clean, logs = root / "start", root / "clean", root / "logs"
    logs.mkdir()
    run_ranks(step_saved, WORLD, str(start), 1)
    shutil.copytree(start, clean)
    for why_not in run_ranks(save_recorded, WORLD, str(clean), tag, engine, str(logs)):
        if why_not:
            pytest.skip(why_not)
    calls = [strace.recorded(logs / str(rank), clean) for rank in range(WORLD)]
    return Scenario(start, tag, engine, calls, contents(start), contents(clean, tag))


@pytest.mark.parametrize(
    "count", [8, pytest.param(None, marks=[pytest.mark.torture, pytest.mark.timeout(3600)])]
)
def test_a_kill_at_any_system_call_of_a_save_leaves_whole_checkpoints(
    count: int | None, scenario: Scenario, tmp_path: Path
) -> None:
    kills = scenario.kills()
    assert {call.name for _, call in kills} >= {"openat", "pwrite64", "fsync", "close"}
    if count is not None:
        kills = printed_dice().sample(kills, count)
    directories = [tmp_path / str(number) for number in range(len(kills))]
    starts: list[Callable[[], Ranks]] = []
    for (victims, call), directory in zip(kills, directories, strict=True):
        shutil.copytree(scenario.start, directory)
        args = (str(directory), scenario.tag, scenario.engine, victims, call)
        starts.append(partial(start_ranks, save_killed, WORLD, *args))
    results = list(zip(kills, directories, run_many(starts), strict=True))
    died = [outcomes[victims[0]].status == "died" for (victims, _), _, outcomes in results]
    assert sum(died) >= len(kills) // 2
    for (victims, call), directory, outcomes in results:
        _check_disk(scenario, directory, _check_ranks(victims, call, outcomes))
    run_ranks(save_again, WORLD, [str(directory) for directory in directories], scenario.tag)
    for directory in directories:
        assert unlisted(directory, scenario.tag) == []
        assert not [name for name in files(directory) if name.endswith(".tmp")]
        assert (directory / "latest").read_text() == f"{scenario.tag}\n"


def _check_ranks(victims: Victims, call: Call, outcomes: list[Outcome]) -> bool:
    """The victim died; others died too, finished, or know who died. Whether somebody finished."""
    # Which thread writes which block, and which rank makes the folder, is chance: such calls may not come again.
    may_finish = call.number > 1 or call.path in FOLDERS
    assert may_finish or outcomes[victims[0]].exit_code == -signal.SIGKILL, call
    finished = False
    for outcome in outcomes:
        if outcome.status != "returned":
            assert outcome.rank in victims, (call, outcome.describe())
            assert outcome.exit_code == -signal.SIGKILL, (call, outcome.describe())
        elif outcome.value is not None:
            assert outcome.value.kind == "RankTimeoutError", (call, outcome.value)
            assert f"rank {victims[0]} died" in outcome.value.text
        else:
            finished = True
    return finished


def _check_disk(scenario: Scenario, directory: Path, finished: bool) -> None:
    """Old and new are both whole, each where it should be; what `latest` names is one of them."""
    either = [scenario.new] if finished else [scenario.old, scenario.new]
    assert contents(directory) in either
    if scenario.tag == "step1":
        return
    assert contents(directory, "step1") == scenario.old
    if (directory / "step2" / "manifest.json").exists():
        assert contents(directory, "step2") == scenario.new
