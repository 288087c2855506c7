"""Two jobs on one directory by mistake: the second is refused; a dead one keeps nobody out; never a mix."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.faults.jobs import Job, Raised, await_file, contents, raised, step_saved, unlisted
from tests.told import told_once, warned
from tests.workers import run_ranks, start_ranks
from zero_ckpt.core import lease
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import SaveError
from zero_ckpt.testing import FaultyStorage, Operation

WORLD = 2


Where = tuple[str, int, list[int]]
"""The name of an operation, which of them, and the ranks that stop before it."""

BEFORE_ANY_FILE: Where = "create", 1, [0, 1]
IN_A_FILE: Where = "write", 1, [0]
BEFORE_THE_MANIFEST: Where = "sync", 2, [0]
"""The first is that of its own files; now all have voted, and only the manifest is left."""


def save_with_a_pause(
    directory: str, paused: str, go_on: str, where: Where = IN_A_FILE
) -> str | Raised:
    """Step 1 as `first`; ranks stop at `where` until `go_on` is there. Rank 0 says by `paused` that it does."""
    lease.RENEWAL = 0.2
    name, number, ranks = where
    seen = 0

    def hook(operation: Operation) -> None:
        nonlocal seen
        seen += operation.name == name
        if (operation.name, seen) == (name, number) and dist.get_rank() in ranks:
            if dist.get_rank() == 0:
                Path(paused).touch()
            await_file(go_on)

    job = Job.at(1, storage=FaultyStorage(LocalStorage(), hook))
    try:
        return job.save(directory, tag="first")
    except SaveError as error:
        return Raised(type(error).__name__, str(error))


def save_refused(directory: str, tag: str, go_on: str) -> tuple[Raised, str]:
    """Step 2 while the other job saves, and once more when that has ended."""
    job = Job.at(2)
    error = raised(job.save, directory, tag=tag)
    Path(go_on).touch()
    await_file(f"{directory}/latest")
    while any(name.startswith(lease.PREFIX) for name in os.listdir(directory)):
        time.sleep(0.02)
    dist.barrier()
    return error, job.save(directory, tag="third")


def save_alone(directory: str) -> None:
    Job.at(1).save(directory, tag="first")
    Job.at(2).save(directory, tag="second")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What one job saves at step 1, and at step 2."""
    root = tmp_path_factory.mktemp("alone")
    run_ranks(save_alone, WORLD, str(root))
    return [contents(root, "first"), contents(root, "second")]


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, str, str]:
    """The directory, and files by which the jobs tell each other how far they are."""
    return str(tmp_path / "run"), str(tmp_path / "paused"), str(tmp_path / "go on")


@pytest.mark.parametrize("tag", ["first", "second"], ids=["the same tag", "another tag"])
def test_the_second_job_is_refused_and_the_first_commits(
    tag: str, places: tuple[str, str, str], alone: list[dict[str, str]]
) -> None:
    root, paused, go_on = places
    with start_ranks(save_with_a_pause, WORLD, *places) as first:
        await_file(paused)
        pid = first.pids[0]
        results = run_ranks(save_refused, WORLD, root, tag, go_on)
        assert [outcome.value for outcome in first.wait()] == [f"{root}/first"] * WORLD
    error = results[0][0]
    assert results == [(error, f"{root}/third")] * WORLD
    assert error.kind == "SaveError"
    assert f"{root}: another job is saving here: process {pid} on host" in error.text
    assert contents(root, "first") == alone[0]
    assert contents(root, "third") == alone[1]
    assert sorted(os.listdir(root)) == ["first", "latest", "third"]
    assert unlisted(root, "first") == []


def test_a_job_that_was_killed_keeps_nobody_out(
    places: tuple[str, str, str], alone: list[dict[str, str]]
) -> None:
    root, paused, _ = places
    with start_ranks(save_with_a_pause, WORLD, *places) as first:
        await_file(paused)
        first.kill()
    assert any(name.startswith(lease.PREFIX) for name in os.listdir(root))
    run_ranks(step_saved, WORLD, root, 2, False, "first")
    assert contents(root) == alone[1]
    assert sorted(os.listdir(root)) == ["first", "latest"]
    assert unlisted(root, "first") == []


def save_over(directory: str) -> str:
    lease.SILENCE = 1.0
    return Job.at(2).save(directory, tag="first")


def save_in_turns(directory: str, name: str, other: str) -> list[list[str]]:
    """Twice, each time after the other job has saved; what each save warned of."""
    job, heard = Job.at(1), []
    for number in (1, 2):
        if name > other or number > 1:
            await_file(f"{directory}/{other}{number - (name < other)}.done")
        heard.append(warned(job.save, directory, tag=f"{name}{number}")[1])
        Path(f"{directory}/{name}{number}.done").touch()
    return heard


def test_jobs_that_save_in_turns_are_told_of_each_other(tmp_path: Path) -> None:
    root = str(tmp_path)
    with start_ranks(save_in_turns, WORLD, root, "a", "b") as first:
        second = run_ranks(save_in_turns, WORLD, root, "b", "a")
        of_first = [outcome.value for outcome in first.wait()]
    for heard, found, left in ((of_first, "b1", "a1"), (second, "a2", "b1")):
        before, after = (told_once(list(texts)) for texts in zip(*heard, strict=True))
        assert before == []  # before its first save a job knows nothing
        [text] = after
        assert text.startswith(f"{root}: 'latest' names '{found}', and not '{left}'")
        assert "Give each job a directory of its own" in text


@pytest.mark.parametrize(
    "where",
    [BEFORE_ANY_FILE, IN_A_FILE, BEFORE_THE_MANIFEST],
    ids=["before any file", "in a file", "before the manifest"],
)
def test_a_job_that_stood_still_too_long_wakes_up_and_harms_nothing(
    where: Where, places: tuple[str, str, str], alone: list[dict[str, str]]
) -> None:
    """Meanwhile another job takes over, saves to the same tag and commits."""
    root, paused, go_on = places
    with start_ranks(save_with_a_pause, WORLD, *places, where) as first:
        await_file(paused)
        for pid in first.pids:
            os.kill(pid, signal.SIGSTOP)
        run_ranks(save_over, WORLD, root)
        Path(go_on).touch()
        for pid in first.pids:
            os.kill(pid, signal.SIGCONT)
        errors = [outcome.value for outcome in first.wait()]
    assert errors == [errors[0]] * WORLD
    assert errors[0].kind == "SaveError"
    assert "another one that saves here has taken over. Nothing was committed" in errors[0].text
    assert contents(root) == alone[1]
    assert sorted(os.listdir(root)) == ["first", "latest"]
    assert unlisted(root, "first") == []
