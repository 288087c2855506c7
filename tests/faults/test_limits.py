"""A process that may not open another file: its save raises on every rank, and leaves what was there."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.faults.jobs import Job, Raised, contents, files, step_saved, unlisted
from tests.workers import run_ranks

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
