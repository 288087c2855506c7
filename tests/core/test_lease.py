"""One job at a time: a live one is never pushed aside, and a dead one keeps nobody out."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zero_ckpt.core import lease
from zero_ckpt.core.lease import PREFIX, Lease
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.object_storage import ObjectStorage
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.watch import identity
from zero_ckpt.errors import SaveError
from zero_ckpt.testing import FaultyStorage, Operation, fail_from

QUICK = 0.02


@pytest.fixture(params=["disk", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    if request.param == "disk":
        return LocalStorage(), str(tmp_path)
    return ObjectStorage("memory"), f"memory://lease{tmp_path}"


@pytest.fixture(autouse=True)
def _no_lease_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    acquired: list[Lease] = []
    acquire = Lease.acquire

    def noted(self: Lease, directory: str, waiting: Callable[[], None]) -> bool:
        acquired.append(self)
        return acquire(self, directory, waiting)

    monkeypatch.setattr(Lease, "acquire", noted)
    yield
    for one in acquired:
        one.release()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL", QUICK)
    monkeypatch.setattr(lease, "_LOOK", QUICK)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than `QUICK` by what a busy machine may delay a thread."""
    monkeypatch.setattr(lease, "SILENCE", 0.5)


def nothing() -> None:
    pass


def acquired(storage: Storage, directory: str, job: str) -> Lease:
    """The lease of another job than this process's, which lives in a thread of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_JOB", job)
        held = Lease(storage)
        held.acquire(directory, nothing)
    return held


def names(storage: Storage, directory: str) -> list[str]:
    try:
        return [entry.name for entry in storage.list(directory)]
    except FileNotFoundError:  # an empty folder is none, on an object store
        return []


def written(storage: Storage, directory: str, content: bytes, suffix: str = "") -> str:
    """What a job left that is not there any more."""
    path = f"{directory}/{PREFIX}abc-1-0{suffix}"
    storage.put(path, content)
    return path


def told_by(process: list[object]) -> bytes:
    return json.dumps(
        {"host": "there", "process": process, "since": "1970", "renewals": 7}
    ).encode()


ELSEWHERE = told_by(["another boot", "pid:[1]", 1, "1"])  # a process that runs here, too


def test_saves_of_one_job_do_not_refuse_each_other(place: tuple[Storage, str]) -> None:
    storage, directory = place
    first, second = Lease(storage), Lease(storage)
    assert not first.acquire(directory, nothing)
    assert not second.acquire(directory, nothing)
    first.release()
    second.check()
    second.release()
    storage.put(f"{directory}/kept", b"")
    assert names(storage, directory) == ["kept"]


@pytest.mark.usefixtures("quick")
def test_a_live_job_refuses_another_and_is_named(place: tuple[Storage, str]) -> None:
    storage, directory = place
    held, other = acquired(storage, directory, "other"), Lease(storage)
    with pytest.raises(SaveError) as caught:
        other.acquire(directory, nothing)
    other.release()
    text = str(caught.value)
    assert text.startswith(f"{directory}: another job is saving here: process {os.getpid()} on ")
    assert " UTC (.saving-other-" in text
    assert "Nothing was written" in text
    assert "Give each job a directory of its own" in text
    held.check()
    left = {
        name.removesuffix(".tmp") for name in names(storage, directory)
    }  # it may be renewed now
    assert len(left) == 1
    held.release()
    assert not other.acquire(directory, nothing)
    other.release()


@pytest.mark.usefixtures("quick")
def test_of_two_jobs_that_begin_at_one_moment_the_second_is_told_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first finds the other's half written file, which it removes."""
    storage, directory = LocalStorage(), str(tmp_path)
    replace, held = os.replace, []

    def late(source: str, target: str) -> None:
        monkeypatch.setattr(os, "replace", replace)
        held.append(acquired(storage, directory, "other"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    mine = Lease(storage)
    with pytest.raises(SaveError, match="another job is saving here"):
        mine.acquire(directory, nothing)
    mine.release()
    held[0].check()
    held[0].release()
    assert names(storage, directory) == []


@pytest.mark.usefixtures("quick")
def test_a_job_that_ends_while_it_is_watched_was_alive(place: tuple[Storage, str]) -> None:
    storage, directory = place
    path = written(storage, directory, ELSEWHERE)
    mine = Lease(storage)
    with pytest.raises(SaveError, match=r"process .* on host 'there', since 1970"):
        mine.acquire(directory, lambda: storage.remove(path))
    mine.release()


@pytest.mark.usefixtures("quick", "impatient")
@pytest.mark.parametrize(
    "content",
    [ELSEWHERE, b"", b"{", b"[]", b"\xff", b'{"process": 7}', told_by(["", "", -1]), b"x" * 5000],
)
def test_a_job_that_stays_silent_is_taken_for_dead_and_not_before(
    content: bytes, tmp_path: Path
) -> None:
    storage, directory = LocalStorage(), str(tmp_path)
    path = written(storage, directory, content)
    there: list[bool] = []
    mine, begin = Lease(storage), time.monotonic()
    assert mine.acquire(directory, lambda: there.append(os.path.exists(path)))
    assert time.monotonic() - begin >= lease.SILENCE
    assert there
    assert all(there)
    mine.release()
    assert names(storage, directory) == []


def test_a_job_whose_process_is_gone_from_this_host_keeps_nobody_waiting(
    place: tuple[Storage, str],
) -> None:
    storage, directory = place
    child = subprocess.Popen(["true"])
    child.wait()
    boot, namespace, _, started = identity()
    content = told_by([boot, namespace, child.pid, started])
    written(storage, directory, content)
    written(storage, directory, content[:20], ".tmp")
    mine = Lease(storage)
    assert not mine.acquire(directory, lambda: pytest.fail("it waited"))
    [name] = names(storage, directory)
    assert not name.startswith(f"{PREFIX}abc")
    mine.release()


@pytest.mark.usefixtures("quick")
def test_what_was_taken_over_is_not_put_back_and_not_committed_with(
    place: tuple[Storage, str],
) -> None:
    storage, directory = place
    mine = Lease(storage)
    mine.acquire(directory, nothing)
    mine.check()
    for _ in range(5):  # it may be written at the moment when it is removed
        for name in names(storage, directory):
            storage.remove(f"{directory}/{name}")
        time.sleep(5 * QUICK)
        if not names(storage, directory):
            break
    with pytest.raises(SaveError, match="another one that saves here has taken over"):
        mine.check()
    mine.release()


@pytest.mark.usefixtures("quick", "impatient")
def test_a_renewal_that_hung_does_not_bring_back_what_was_taken_over(tmp_path: Path) -> None:
    """A network file system may hang between the look at the file and its change."""
    armed, arrived, go_on = threading.Event(), threading.Event(), threading.Event()

    def hang(_: Operation) -> None:
        if armed.is_set():
            arrived.set()
            go_on.wait(10)

    storage = FaultyStorage(LocalStorage(), hang, names={"put"})
    held, mine = acquired(storage, str(tmp_path), "other"), Lease(LocalStorage())
    armed.set()
    assert arrived.wait(10)
    renewals = held._renewals
    assert mine.acquire(str(tmp_path), nothing)
    go_on.set()
    while held._renewals == renewals:  # the one that hung has ended
        time.sleep(QUICK)
    with pytest.raises(SaveError, match="another one that saves here has taken over"):
        held.check()
    mine.check()


def test_a_folder_of_that_name_is_somebodys_checkpoint(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}tag" / "in").mkdir(parents=True)
    mine = Lease(LocalStorage())
    assert not mine.acquire(str(tmp_path), nothing)
    mine.release()
    assert names(LocalStorage(), str(tmp_path)) == [f"{PREFIX}tag"]


def test_a_place_that_takes_no_file_says_so_and_nothing_runs_on(tmp_path: Path) -> None:
    mine = Lease(FaultyStorage(LocalStorage(), fail_from(0, errno.EROFS)))
    with pytest.raises(OSError, match="Read-only"):
        mine.acquire(str(tmp_path), nothing)
    mine.release()
    assert os.listdir(tmp_path) == []
