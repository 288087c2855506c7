"""Disks that fill up, refuse or break, at every operation of a save: all ranks raise the same, nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.faults.jobs import (
    SHORT,
    Job,
    Raised,
    contents,
    files,
    raised,
    resources,
    unlisted,
)
from tests.told import told_once, warned
from tests.workers import run_ranks
from zero_ckpt.core import engine, staging
from zero_ckpt.core import local_storage as storage_module
from zero_ckpt.core.control import LocalControl
from zero_ckpt.core.lease import PREFIX
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import RankTimeoutError, SaveError
from zero_ckpt.testing import FaultyStorage, Operation, fail_at, fail_from

WORLD = 2


def ignore(_: Operation) -> None:
    pass


# An error at every operation


def attempt(job: Job, root: str, tag: str) -> Raised | list[str]:
    """The error of a save, or the warnings of one that was committed."""
    try:
        return warned(job.save, root, tag=tag)[1]
    except SaveError as error:
        return Raised(type(error).__name__, str(error))


def fail_everywhere(root: str, tag: str, victim: int, code: int) -> dict[str, Any]:
    """Fail each operation of `victim` in turn; what every rank got, and what was on disk after each."""
    Job.at(1).save(root, tag="step1")
    shutil.copytree(root, f"{root}-start") if dist.get_rank() == 0 else None
    probe = FaultyStorage(LocalStorage())
    Job.at(2, storage=probe).save(root, tag=tag)
    count = [len(probe.log)]
    dist.broadcast_object_list(count, src=victim)
    before = resources()
    outcomes, left, failed = [], [], []
    for number in range(count[0]):
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(root)
            shutil.copytree(f"{root}-start", root)
        dist.barrier()
        hook = fail_at(number, code) if dist.get_rank() == victim else ignore
        storage = FaultyStorage(LocalStorage(), hook)
        outcomes.append(attempt(Job.at(2, storage=storage), root, tag))
        dist.barrier()
        left.append((files(root), contents(root, tag) if dist.get_rank() == 0 else None))
        if dist.get_rank() == victim:  # writes come in another order each time
            failed.append((storage.log[number].name, storage.log[number].path))
    after = resources()
    Job.at(3).save(root, tag=tag)
    log = [failed]
    dist.broadcast_object_list(log, src=victim)
    return {"log": log[0], "outcomes": outcomes, "left": left, "leaks": (before, after)}


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_at_any_operation_of_an_overwrite(victim: int, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    results = run_ranks(fail_everywhere, WORLD, str(root), "step1", victim, errno.EIO, timeout=90)
    log = results[0]["log"]
    commit = log.index(("put", f"{root}/step1/manifest.json")) if victim == 0 else len(log)
    old_files = files(f"{root}-start")
    old = contents(f"{root}-start", "step1")
    assert len(log) > 12
    for number, (name, path) in enumerate(log):
        got = [result["outcomes"][number] for result in results]
        there, state = results[0]["left"][number]
        is_lease = f"/{PREFIX}" in path
        if number <= commit and (name != "get" or is_lease):
            assert got[0] == got[1], (name, path, got)
            told = root if is_lease and name == "put" else path
            assert got[0].kind == "SaveError"
            assert f"{told}: Input/output error. Nothing was committed" in got[0].text, got[0]
            assert "[Errno" not in got[0].text
            assert there == old_files
            assert state == old
        else:
            texts = told_once(got)
            assert all(text.startswith(f"{root}/step1 is committed") for text in texts)
            # A manifest that cannot be read before a save is overwritten all the same.
            # A lease that cannot be removed is told to nobody: it only makes another job wait.
            assert len(texts) == (name != "get" and not is_lease), (name, path, got)
            assert state != old
    for result in results:
        assert result["leaks"][0] == result["leaks"][1]
    assert unlisted(root, "step1") == []


def test_an_error_at_any_operation_of_a_new_tag(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    results = run_ranks(fail_everywhere_new, WORLD, str(root), errno.ENOSPC, timeout=90)
    old_files = results[0]["start"]
    paths = [path for _, path in results[0]["log"]]
    for number, (name, path) in enumerate(results[0]["log"]):
        got = [result["outcomes"][number] for result in results]
        assert got[0] == got[1]
        if isinstance(got[0], Raised):  # of what fails from here on, writes come in any order
            expected = [f"rank 1: {later}: No space left on device" for later in set(paths)]
            assert any(text in got[0].text for text in expected), got[0]
            assert results[0]["left"][number] == old_files, (name, path)
    kinds = {name for name, _ in results[0]["log"]}
    assert kinds == {"create", "write", "finish", "sync"}
    assert all(isinstance(outcome, Raised) for outcome in results[0]["outcomes"])
    assert unlisted(root, "step2") == []


def fail_everywhere_new(root: str, code: int) -> dict[str, Any]:
    """Rank 1's operations fail from each one on, as a disk that is full stays full."""
    Job.at(1).save(root, tag="step1")
    dist.barrier()
    start = files(root)
    probe = FaultyStorage(LocalStorage())
    Job.at(2, storage=probe).save(f"{root}-probe", tag="step2")
    names = {"create", "write", "finish", "sync"}  # removing works on a full disk
    recorded = [[(o.name, o.path.replace("-probe", "")) for o in probe.log if o.name in names]]
    dist.broadcast_object_list(recorded, src=1)
    outcomes, left = [], []
    for number in range(len(recorded[0])):
        hook = fail_from(number, code) if dist.get_rank() == 1 else ignore
        storage = FaultyStorage(LocalStorage(), hook, names=names)
        outcomes.append(attempt(Job.at(2, storage=storage), root, "step2"))
        dist.barrier()
        left.append(files(root))
        dist.barrier()
    Job.at(2).save(root, tag="step2")
    return {"log": recorded[0], "outcomes": outcomes, "left": left, "start": start}


# Directories that cannot be written


def save_into(directories: list[str]) -> list[Raised]:
    job = Job.at(1)
    before = job.bits()
    errors = [raised(job.save, directory, tag="tag") for directory in directories]
    assert job.bits() == before
    return errors


def test_files_and_links_where_folders_are_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "tagged").mkdir()
    (tmp_path / "tagged" / "tag").write_text("not a folder")
    (tmp_path / "linked" / "other").mkdir(parents=True)
    (tmp_path / "linked" / "tag").symlink_to("other")
    taken = (
        "a file or a link, where the tag's folder belongs. Nothing was written. Remove it, or use"
    )
    expected = {
        tmp_path
        / "file": "Not a directory. Nothing was committed; earlier checkpoints are intact.",
        tmp_path / "file" / "below": "Not a directory. Nothing was committed; earlier checkpoints",
        tmp_path / "tagged": taken,
        tmp_path / "linked": taken,
    }
    before = files(tmp_path)
    results = run_ranks(save_into, WORLD, [str(directory) for directory in expected])
    assert results[0] == results[1]
    for (directory, text), error in zip(expected.items(), results[0], strict=True):
        assert error.kind == "SaveError"
        assert str(directory) in error.text
        assert text in error.text
    assert files(tmp_path) == before


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Any]:
    """Mounts a tmpfs on a folder, with options. Skips where that is not allowed."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_file_system(mount: Any) -> None:
    folder = mount("ro")
    results = run_ranks(save_into, WORLD, [str(folder)])
    (error,) = results[0]
    assert results[0] == results[1]
    assert error.kind == "SaveError"
    assert f"{folder}: Read-only file system. Nothing was committed" in error.text
    assert str(error).count("Read-only") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    results = run_ranks(save_into, WORLD, [str(tmp_path)])
    tmp_path.chmod(0o700)
    assert results[0] == results[1]
    assert f"{tmp_path}: Permission denied. Nothing was committed" in results[0][0].text


# A disk that is full half-way


class Unsized(LocalStorage):
    """A file system that does not say how much room is left, as some network file systems do not."""

    def free_bytes(self, path: str) -> int | None:
        return None


def fill_disk(root: str, reserve: bool, sized: bool) -> dict[str, Any]:
    """Rank 1 has more to write than fits. Then room is made, training goes on, and the next save works."""
    if not reserve:
        storage_module._reserve = lambda fd, nbytes: None  # as where space cannot be reserved
    job = Job.at(1, storage=LocalStorage() if sized else Unsized(), sharded=True, width=20_000)
    job.save(root, tag="first")
    dist.barrier()
    before = resources()
    there = files(root)
    first = contents(root, "first")
    job.advance()
    errors = [raised(job.save, root, tag=tag) for tag in ("second", "first")]
    dist.barrier()
    found = {
        "errors": errors,
        "same files": files(root) == there,
        "same bytes": contents(root, "first") == first,
        "leaks": (before, resources()),
    }
    dist.barrier()
    job.advance()
    if dist.get_rank() == 0:
        Path(root).with_name("other").unlink()
    dist.barrier()
    job.save(root, tag="second")
    return found


@pytest.mark.parametrize(
    ("reserve", "sized", "text"),
    [
        (True, True, "MB are free. Nothing was written. Make room, or keep fewer checkpoints."),
        (True, False, ".safetensors: No space left on device. Nothing was committed"),
        (False, False, ".safetensors: No space left on device. Nothing was committed"),
    ],
    ids=["asked before", "found out at the start", "found out half-way"],
)
def test_a_full_disk(mount: Any, reserve: bool, sized: bool, text: str) -> None:
    folder = mount("size=12m")
    (folder / "other").write_bytes(bytes(8 << 20))
    results = run_ranks(fill_disk, WORLD, str(folder / "checkpoints"), reserve, sized)
    assert results[0]["errors"] == results[1]["errors"]
    for error in results[0]["errors"]:
        assert error.kind == "SaveError"
        assert text in error.text
    for result in results:
        assert result["same files"]
        assert result["same bytes"]
        assert result["leaks"][0] == result["leaks"][1]
    assert contents(folder / "checkpoints", "second")


# Around the moment of commit


def test_a_manifest_that_cannot_be_made_durable_costs_neither_checkpoint(tmp_path: Path) -> None:
    """The rename was done, the sync of its folder failed: a power failure may bring the old manifest back."""

    class BrokenSync(LocalStorage):
        def put(self, path: str, data: bytes) -> None:
            super().put(path, data)
            if path.endswith("/manifest.json"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), os.path.dirname(path))

    Job.at(1).save(tmp_path, tag="tag")
    old_files = files(tmp_path)
    with pytest.raises(SaveError, match="the manifest is in place, but the disk did not") as caught:
        Job.at(2, storage=BrokenSync()).save(tmp_path, tag="tag")
    assert f"durable: {tmp_path}/tag: Input/output error. The checkpoint loads" in str(caught.value)
    assert set(old_files) < set(files(tmp_path))
    job = Job.at(2)
    bits, loaded = job.bits(), Job.at(0)
    loaded.load(tmp_path)
    assert loaded.bits() == bits
    job.advance()
    job.save(tmp_path, tag="tag")
    assert unlisted(tmp_path, "tag") == []


class AnswerLost(LocalControl):
    """Rank 0 decides, and is cut off before it can tell anyone."""

    def meet(self, phase: str, record: bytes, decide: Any, timeout: float) -> bytes:
        answer = super().meet(phase, record, decide, timeout)
        if phase == "save: vote":
            raise RankTimeoutError("cut off")
        return answer


@pytest.mark.parametrize("tag", ["old", "new"])
def test_a_lost_answer_after_the_commit_costs_no_file(
    tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Job.at(1).save(tmp_path, tag="old")
    monkeypatch.setattr(engine, "control_for_process_group", lambda _: AnswerLost())
    with pytest.raises(RankTimeoutError, match="cut off"):
        Job.at(2).save(tmp_path, tag=tag)
    assert contents(tmp_path, tag)
    assert contents(tmp_path, "old")
    assert unlisted(tmp_path, tag) == []


@pytest.mark.parametrize("name", ["latest", "tag/manifest.json"])
def test_a_folder_in_the_place_of_a_file(name: str, tmp_path: Path) -> None:
    job = Job.at(1)
    (tmp_path / name / "something").mkdir(parents=True)
    if name == "latest":
        _, texts = warned(job.save, tmp_path, tag="tag")
        (text,) = texts
        assert text.startswith(
            f"{tmp_path}/tag is committed and durable, but what follows a commit"
        )
        assert f"failed: {tmp_path}/latest.tmp: Is a directory. 'latest' or older" in text
        assert contents(tmp_path, "tag")
    else:
        error = raised(job.save, tmp_path, tag="tag")
        assert error.kind == "SaveError"
        assert "manifest.json.tmp: Is a directory. Nothing was committed" in error.text
    assert not [path for path in files(tmp_path) if path.endswith(".tmp")]


# Saves that fail again and again


def test_failing_copies_do_not_use_up_the_staging_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.at(1)
    job.save(tmp_path)
    before = resources()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with monkeypatch.context() as patch:
        patch.setattr(staging.Source, "copy_to", broken)
        for _ in range(10):
            error = raised(job.save, tmp_path, tag="tag")
            assert error.kind == "SaveError"
            assert error.text.startswith("RuntimeError: CUDA error: device-side assert triggered. ")
    assert resources() == before
    job.save(tmp_path, tag="tag")
    assert contents(tmp_path, "tag")


def interrupt(root: str) -> list[str]:
    """Ctrl-C on rank 1 in the middle of its writing; the user catches it, and all go on."""

    def hook(operation: Operation) -> None:
        if operation.number == 1 and dist.get_rank() == 1:
            raise KeyboardInterrupt

    storage = FaultyStorage(LocalStorage(), hook, names={"create"})
    job = Job.at(1, storage=storage, timeout=SHORT)
    told = "interrupted"
    with contextlib.suppress(KeyboardInterrupt):
        told = raised(job.save, root, tag="tag").text
    dist.barrier()
    left = files(root)
    dist.barrier()
    Job.at(2).save(root, tag="tag")
    return [told, *left]


def test_an_interrupted_rank_is_missed_and_all_go_on(tmp_path: Path) -> None:
    results = run_ranks(interrupt, WORLD, str(tmp_path), timeout=30)
    assert results[1] == ["interrupted"]
    assert "rank 1 did not arrive or make progress" in results[0][0]
    assert results[0][1:] == []
    assert contents(tmp_path, "tag")
