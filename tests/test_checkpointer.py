"""`Checkpointer` with real ranks: whatever shards the model, all of its state comes back, anywhere."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.core.jobs import Job, assert_same, make_job, options_of, whole_state
from tests.workers import run_ranks

CLIENT_STATE = {"epoch": 3, "best": float("inf"), "names": ("a", "b"), "seen": {1, 2}}


def _start(kind: str, directory: str) -> None:
    """Train, save, and keep the whole state for comparison."""
    job = make_job(kind)
    with job.checkpointer() as checkpointer:
        job.train(2)
        checkpointer.save_checkpoint(directory, client_state=CLIENT_STATE)
    state = whole_state(job)
    if dist.get_rank() == 0:
        torch.save([state, job.raw.notes, options_of(job)], f"{directory}/reference.pt")


def _resume_equals_uninterrupted(kind: str, directory: str) -> None:
    straight = make_job(kind)
    with straight.checkpointer() as checkpointer:
        straight.train(2)
        checkpointer.save_checkpoint(directory, client_state=CLIENT_STATE)
        straight.train(2)

    resumed = make_job(kind, seed=1)
    checkpointer = resumed.checkpointer()
    path, client_state = checkpointer.load_checkpoint(directory)
    assert path == f"{directory}/global_step2"
    assert client_state == CLIENT_STATE
    assert checkpointer.global_step == 2
    resumed.train(2)
    assert resumed.losses == straight.losses[2:]
    assert_same(whole_state(resumed), whole_state(straight))
    assert options_of(resumed) == options_of(straight)
    assert resumed.scheduler.state_dict() == straight.scheduler.state_dict()
    assert resumed.raw.notes == straight.raw.notes


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        ("plain", 1),
        ("ddp", 2),
        ("zero1", 2),
        ("fsdp", 2),
        ("fsdp", 3),
        ("hybrid", 4),
        ("tensor_parallel", 4),
        ("checkpointed", 2),
        ("compiled", 2),
    ],
)
def test_a_resumed_run_continues_bitwise(kind: str, world_size: int, tmp_path: Path) -> None:
    run_ranks(_resume_equals_uninterrupted, world_size, kind, str(tmp_path))


SAVED = [
    ("plain", 1), ("ddp", 2), ("zero1", 3), ("fsdp", 1), ("fsdp", 4), ("hybrid", 4), ("tensor_parallel", 4),
    ("checkpointed", 2), ("compiled", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of every kind: directory by name."""
    found = {}
    for kind, world_size in SAVED:
        directory = str(tmp_path_factory.mktemp(f"{kind}{world_size}"))
        run_ranks(_start, world_size, kind, directory)
        found[f"{kind}@{world_size}"] = directory
    return found


def _load_all(kind: str, directories: dict[str, str]) -> None:
    for name, directory in directories.items():
        job = make_job(kind, seed=1)
        if len(name) % 2:  # into state that is there already, and into none
            job.train(1)
        _load_and_compare(job, directory, int(name[-1]))


def _load_and_compare(job: Job, directory: str, saved_by: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, client_state = job.checkpointer().load_checkpoint(directory)
    told = any("random number generators are derived" in str(w.message) for w in caught)
    assert told == (dist.get_rank() == 0 and saved_by != dist.get_world_size())
    assert client_state == CLIENT_STATE
    state, notes, options = torch.load(f"{directory}/reference.pt")
    assert_same(whole_state(job), state)
    assert job.raw.notes == notes
    assert options_of(job) == options
    job.train(1)  # what was loaded can be trained on


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("plain", 1), ("ddp", 3), ("zero1", 2), ("fsdp", 2), ("fsdp", 3), ("hybrid", 4), ("tensor_parallel", 4)],
)  # fmt: skip
def test_every_kind_of_job_loads_every_checkpoint_bitwise(
    kind: str, world_size: int, saved: dict[str, str]
) -> None:
    run_ranks(_load_all, world_size, kind, saved)
