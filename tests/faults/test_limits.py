"""A process that may open no more files, or has no more memory: it raises on every rank, and leaves what was there."""

from __future__ import annotations

import errno
import io
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.faults.jobs import Job, Raised, contents, files, step_saved, unlisted
from tests.workers import run_ranks
from zero_ckpt.cli import program
from zero_ckpt.core import local_storage

WORLD = 2
SPARE = range(8)


def save_with_few_files(directory: str) -> list[Raised | None]:
    """What rank 1 saves with room for 0, 1, 2, ... more open files; then with all the room there was."""
    job = Job.at(2)
    job.save(f"{directory}-other")  # connections and imports are made
    room = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes: list[Raised | None] = []
    for spare in SPARE:
        dist.barrier()
        if dist.get_rank() == 1:
            used = len(os.listdir("/proc/self/fd")) - 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, room[1]))
        try:
            job.save(directory, tag=f"spare{spare}")
            outcomes.append(None)
        except Exception as error:
            outcomes.append(Raised(type(error).__name__, str(error)))
        resource.setrlimit(resource.RLIMIT_NOFILE, room)
    job.save(directory, tag="after")
    return outcomes


@pytest.mark.slow
def test_a_rank_that_may_open_no_more_files(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_ranks(step_saved, WORLD, str(directory), 1)
    old = contents(directory, "step1")
    first, second = run_ranks(save_with_few_files, WORLD, str(directory))
    assert first == second
    for spare, outcome in zip(SPARE, first, strict=True):
        if outcome is None:
            assert unlisted(directory, f"spare{spare}") == []
        else:
            assert outcome.kind == "SaveError"
            assert "rank 1: " in outcome.text
            assert "Too many open files" in outcome.text
            assert not (directory / f"spare{spare}").exists()
    assert first[0] is not None
    assert first[-1] is None
    assert contents(directory, "step1") == old
    assert contents(directory, "after")
    assert not [name for name in files(directory) if name.endswith(".tmp")]


MIB = 1 << 20
SPARE_MEMORY = [0, 1, 4, 12, 24, 48, 96, 512]
"""MiB. A thread takes 8 of them, and a load has seven; a load's buffers take 36, and the optimizer's state 18."""

WIDE = 200_000


@contextmanager
def little_memory(spare: int) -> Iterator[None]:
    """Inside, rank 1 may have so many MiB more address space than it has now."""
    room = resource.getrlimit(resource.RLIMIT_AS)
    if dist.get_rank() == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + spare * MIB, room[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, room)


def outcome_of(call: Callable[..., Any], *args: Any, **options: Any) -> Raised | None:
    try:
        call(*args, **options)
    except Exception as error:
        return Raised(type(error).__name__, str(error))
    return None


def save_with_little_memory(directory: str, is_async: bool) -> list[Raised | None]:
    """One save with each amount, by an engine that has its buffers; the first of all is made without a limit."""
    job = Job.at(2, width=WIDE, engine="async" if is_async else "sync")
    job.save(directory, tag="first")
    job.checkpointer.wait()
    outcomes = []

    def save(tag: str) -> None:
        job.save(directory, tag=tag)
        job.checkpointer.wait()

    for spare in SPARE_MEMORY:
        dist.barrier()
        with little_memory(spare):
            outcomes.append(outcome_of(save, f"spare{spare}"))
    save("after")
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_save_without_memory(is_async: bool, tmp_path: Path) -> None:
    results = run_ranks(save_with_little_memory, WORLD, str(tmp_path), is_async)
    assert results[0] == results[1]
    for spare, outcome in zip(SPARE_MEMORY, results[0], strict=True):
        if outcome is None:
            assert unlisted(tmp_path, f"spare{spare}") == []
        else:
            assert outcome.kind == "SaveError"
            assert outcome.text.startswith("rank 1: MemoryError: no room for "), outcome
            assert "Nothing was committed; earlier checkpoints are intact" in outcome.text
            assert not (tmp_path / f"spare{spare}").exists()
    assert results[0][0] is not None
    assert results[0][-1] is None
    assert contents(tmp_path, "first") == contents(tmp_path, "after")


def load_with_little_memory(directory: str) -> list[tuple[Raised | None, bool]]:
    """Loads into new jobs; of each, whether it is as it was before."""
    Job.at(2, width=WIDE).save(directory, tag="only")
    saved = Job.at(2, width=WIDE).bits()
    outcomes = []
    for spare in SPARE_MEMORY:
        job = Job.at(0, width=WIDE)
        before = job.bits()
        dist.barrier()
        with little_memory(spare):
            outcome = outcome_of(job.load, directory)
        outcomes.append((outcome, job.bits() == before))
    job = Job.at(0, width=WIDE)
    job.load(directory)
    assert job.bits() == saved
    return outcomes


@pytest.mark.slow
def test_a_load_without_memory(tmp_path: Path) -> None:
    results = run_ranks(load_with_little_memory, WORLD, str(tmp_path))
    for first, second in zip(*results, strict=True):
        assert first == second, (first, second)
        outcome, untouched = first
        assert untouched is (outcome is not None)
        if outcome is not None:
            assert outcome.kind == "ZeroCkptError"
            assert outcome.text.startswith("rank 1: "), outcome
            assert "emory" in outcome.text
            assert outcome.text.endswith("Nothing was loaded."), outcome
    assert results[0][0][0] is not None
    assert results[0][-1][0] is None


def commands_with_little_memory(directory: str) -> dict[str, list[tuple[int, str]]]:
    """Of each command what it returned and told on stderr, in a process with each amount."""
    found: dict[str, list[tuple[int, str]]] = {"verify": [], "export": []}
    if dist.get_rank() == 0:
        return found
    for spare in SPARE_MEMORY:
        for command, outcomes in found.items():
            out = [f"{directory}/{spare}.safetensors"] if command == "export" else []
            told = io.StringIO()
            with little_memory(spare), redirect_stderr(told):
                status = program.main([command, directory, *out])
            outcomes.append((status, told.getvalue()))
    return found


def test_commands_without_memory(tmp_path: Path) -> None:
    """They end, say why, and leave nothing half written."""
    run_ranks(step_saved, WORLD, str(tmp_path), 1)
    found = run_ranks(commands_with_little_memory, WORLD, str(tmp_path))[1]
    for command, outcomes in found.items():
        for status, told in outcomes:
            assert told.startswith(f"zero-ckpt {command}: ") is bool(status), told
            assert not status or "emory" in told, told
        assert outcomes[0][0] != 0
        assert outcomes[-1] == (0, "")
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


# What a file system may lack


def train_on_a_poor_file_system(directory: str) -> tuple[list[str], set[str], str]:
    """New tags, an overwrite, a retired one and a load, where O_DIRECT is refused. What was asked of the system."""
    opened = os.open
    refused, asked = [], set()

    def refuse_direct(path: str, flags: int, *mode: int, **options: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(f"{'write' if flags & os.O_WRONLY else 'read'} {os.path.basename(path)}")
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return opened(path, flags, *mode, **options)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.link", "os.symlink") or (
            event == "open" and str(args[0]).startswith("/dev/shm")
        ):
            asked.add(f"{event} {args[0]}")

    sys.addaudithook(watch)
    os.open = refuse_direct  # type: ignore[assignment]
    local_storage.cached_fraction = lambda *_: 0.0  # or reads would not even try
    job = Job.at(1, keep_last=2)
    for step in (1, 2, 3):
        job.save(directory, tag=f"step{step}")
        job.advance()
    job.save(directory, tag="step3")
    bits, loaded = job.bits(), Job.at(0)
    assert loaded.load(directory) == "step3"
    assert loaded.bits() == bits
    return refused, asked, loaded.bits()


def test_a_file_system_without_direct_io_hard_links_or_shared_memory(tmp_path: Path) -> None:
    results = run_ranks(train_on_a_poor_file_system, WORLD, str(tmp_path))
    for rank, (refused, asked, _) in enumerate(results):
        assert f"write model-0000{rank}-of-00002.safetensors" in refused
        assert f"read model-0000{rank}-of-00002.g2.safetensors" in refused
        assert asked == set()
    assert results[0][2] == results[1][2]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step2", "step3"]
    assert unlisted(tmp_path, "step3") == []
