"""Ranks that do not agree, come late or never come: the same error on all, in bounded time; then it works again."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.faults.jobs import (
    SHORT,
    Job,
    Raised,
    await_file,
    contents,
    files,
    raised,
    unlisted,
)
from tests.told import told_once, warned
from tests.workers import run_ranks, start_ranks
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import RankTimeoutError
from zero_ckpt.testing import FaultyStorage, Operation

WORLD = 3


def same_on_all(errors: list[Raised]) -> Raised:
    assert len(set(errors)) == 1, "\n".join(map(str, errors))
    return errors[0]


# Different tags and directories


def save_differently(root: str, mode: str, what: str) -> tuple[list[str], Raised | str]:
    rank = dist.get_rank()
    job = Job.at(1, sharded=True, tag_validation=mode)
    directory = f"{root}/dir{rank}" if what == "directory" else f"{root}/dir0"
    tag = f"tag{rank}" if what == "tag" else "tag0"
    if mode == "fail":
        return [], raised(job.save, directory, tag=tag)
    path, texts = warned(job.save, directory, tag=tag)
    return texts, path


@pytest.mark.parametrize("what", ["tag", "directory"])
@pytest.mark.parametrize("mode", ["ignore", "warn"])
def test_different_tags_save_to_rank_0s_and_never_tear(
    mode: str, what: str, tmp_path: Path
) -> None:
    results = run_ranks(save_differently, WORLD, str(tmp_path), mode, what)
    assert [path for _, path in results] == [f"{tmp_path}/dir0/tag0"] * WORLD
    assert os.listdir(tmp_path) == ["dir0"]
    assert sorted(os.listdir(tmp_path / "dir0")) == ["latest", "tag0"]
    assert contents(tmp_path / "dir0")
    texts = told_once([texts for texts, _ in results])
    if mode == "ignore":
        assert texts == []
    else:
        other = f"{tmp_path}/dir0/tag1" if what == "tag" else f"{tmp_path}/dir1/tag0"
        (text,) = texts
        assert f"rank 0: '{tmp_path}/dir0/tag0', rank 1: '{other}'" in text
        assert "All ranks save to rank 0's" in text


@pytest.mark.parametrize("what", ["tag", "directory"])
def test_different_tags_are_refused_where_that_was_asked_for(what: str, tmp_path: Path) -> None:
    results = run_ranks(save_differently, WORLD, str(tmp_path), "fail", what)
    error = same_on_all([error for _, error in results if isinstance(error, Raised)])
    assert error.kind == "DisagreementError"
    assert "ranks were given different tags or directories" in error.text
    assert "Nothing was written" in error.text
    assert "tag_validation='warn'" in error.text
    assert os.listdir(tmp_path) == []


def save_at_different_steps(root: str) -> tuple[Raised, str]:
    job = Job.at(1)
    error = raised(job.save, root, tag="t", step=5 + (dist.get_rank() == 2))
    return error, job.save(root, tag="t", step=6)


def test_state_of_different_steps_is_never_joined(tmp_path: Path) -> None:
    results = run_ranks(save_at_different_steps, WORLD, str(tmp_path))
    error = same_on_all([error for error, _ in results])
    assert error.kind == "DisagreementError"
    assert "rank 0 at step 5, rank 2 at step 6" in error.text
    assert contents(tmp_path)


def save_bad_tags(root: str, tags: list[str]) -> list[Raised]:
    job = Job.at(1)
    return [raised(job.save, root, tag=tag) for tag in tags]


def test_a_tag_that_is_no_folder_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tags = ["", ".", "..", "../up", "a/b", "latest", "a\nb", " a", "-rf", "x" * 300]
    by_rank = run_ranks(save_bad_tags, WORLD, str(tmp_path / "checkpoints"), tags)
    for tag, errors in zip(tags, zip(*by_rank, strict=True), strict=True):
        error = same_on_all(list(errors))
        assert error.kind == "ConfigurationError"
        assert repr(tag) in error.text
    assert files(tmp_path) == []


# Ranks that do not come


def save_without(root: str, absent: int) -> tuple[Raised | None, str]:
    """One rank skips a save; then all make the next."""
    job = Job.at(1, sharded=True, timeout=SHORT)
    error = None if dist.get_rank() == absent else raised(job.save, root, tag="first")
    dist.barrier()
    return error, Job.at(2, sharded=True).save(root, tag="second")


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_saves_is_named_and_the_next_save_works(
    absent: int, tmp_path: Path
) -> None:
    results = run_ranks(save_without, WORLD, str(tmp_path), absent, timeout=30)
    error = same_on_all([error for error, _ in results if error is not None])
    assert error.kind == "RankTimeoutError"
    assert f"rank {absent} did not arrive" in error.text
    assert "Nothing was committed; earlier checkpoints are intact" in error.text
    assert sorted(os.listdir(tmp_path)) == ["latest", "second"]
    assert unlisted(tmp_path, "second") == []


def come_late(root: str, given_up: str) -> list[Raised | str]:
    """Rank 1 begins its first save when rank 0 has given up on it."""
    job = Job.at(1, timeout=SHORT)
    if dist.get_rank() == 1:
        await_file(given_up)
    outcomes: list[Raised | str] = [raised(job.save, root, tag="first")]
    if dist.get_rank() == 0:
        Path(given_up).touch()
    dist.barrier()
    outcomes.append(Job.at(2).save(root, tag="second"))
    return outcomes


def test_a_late_rank_gives_up_in_its_turn_and_the_next_save_is_of_one_step(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    given_up = str(tmp_path / "given up")
    results = run_ranks(come_late, WORLD, str(root), given_up)
    for rank, (error, path) in enumerate(results):
        assert isinstance(error, Raised)
        assert error.kind == "RankTimeoutError"
        assert f"rank {0 if rank == 1 else 1} did not arrive" in error.text
        assert path == f"{root}/second"
    assert sorted(os.listdir(root)) == ["latest", "second"]


def save_or_load(root: str) -> list[Raised | str]:
    """Rank 1 loads while the others save; then all load while rank 1 saves; then all do the same."""
    job = Job.at(1)
    job.save(root, tag="good")
    mine, others = (job.load, job.save) if dist.get_rank() == 1 else (job.save, job.load)
    outcomes: list[Raised | str] = []
    for call in (mine, others):
        options = {"tag": "torn"} if call == job.save else {}
        before = job.bits()
        outcomes.append(raised(call, root, **options))
        assert job.bits() == before
        dist.barrier()
    outcomes += [job.load(root), job.save(root, tag="next")]
    return outcomes


def test_one_rank_loads_while_another_saves(tmp_path: Path) -> None:
    results = run_ranks(save_or_load, WORLD, str(tmp_path), timeout=30)
    for call, at_rank_0 in enumerate(["save: agree", "load: open"]):
        errors = [result[call] for result in results]
        assert all(isinstance(error, Raised) for error in errors)
        error = same_on_all([error for error in errors if isinstance(error, Raised)])
        assert error.kind == "DisagreementError"
        at_rank_1 = "load: open" if call == 0 else "save: agree"
        assert f"rank 1 is in '{at_rank_1}' while rank 0 is in '{at_rank_0}'" in error.text
    assert all(result[2:] == ["good", f"{tmp_path}/next"] for result in results)
    assert sorted(os.listdir(tmp_path)) == ["good", "latest", "next"]


def load_differently(root: str) -> list[Raised]:
    job = Job.at(1)
    job.save(root, tag="one")
    job.save(root, tag="two")
    job.advance()
    before = job.bits()
    first = dist.get_rank() == 0
    errors = [
        raised(job.load, root, tag="one" if first else "two"),
        raised(job.load, root if first else f"{root}/one"),
        raised(job.load, root, tag="one" if first else None),
    ]
    assert job.bits() == before
    assert job.load(root) == "two"
    return errors


def test_ranks_that_ask_for_different_checkpoints_load_none(tmp_path: Path) -> None:
    by_rank = run_ranks(load_differently, WORLD, str(tmp_path))
    for errors in zip(*by_rank, strict=True):
        error = same_on_all(list(errors))
        assert error.kind == "DisagreementError"
        assert "ranks were asked to load different checkpoints: rank 0: " in error.text
        assert "rank 1: " in error.text


def save_with_one_refusing(root: str) -> tuple[list[Raised], str]:
    """A part of rank 1's state raises, cannot be stored, or is another tensor than elsewhere."""
    errors = []
    odd = dist.get_rank() == 1
    job = Job.at(1)
    weight = job.model.first.weight

    def broken() -> None:
        raise ValueError("no state today")

    with pytest.MonkeyPatch.context() as patch:
        if odd:
            patch.setattr(job.scheduler, "state_dict", broken)
        errors.append(raised(job.save, root, tag="t"))
    if odd:
        job.model.first.weight = type(weight)(weight[:3])
    errors.append(raised(job.save, root, tag="t"))
    job.model.first.weight = type(weight)(weight.to("meta")) if odd else weight
    errors.append(raised(job.save, root, tag="t"))
    job.model.first.weight = weight
    return errors, job.save(root, tag="t")


def test_what_one_rank_cannot_save_is_raised_on_all(tmp_path: Path) -> None:
    by_rank = run_ranks(save_with_one_refusing, WORLD, str(tmp_path))
    raised_, shaped, meta = (
        same_on_all(list(e)) for e in zip(*(errors for errors, _ in by_rank), strict=True)
    )
    assert raised_.kind == "SaveError"
    assert "rank 1: ValueError: no state today. Nothing was committed" in raised_.text
    assert shaped.kind == "StateMismatchError"
    assert "'first.weight'" in shaped.text
    assert meta.kind == "StateMismatchError"
    assert "rank 1: tensor 'first.weight' is on the meta device" in meta.text
    assert unlisted(tmp_path, "t") == []


# Slow, stopped and lost


def save_slowly(root: str, given_up: str) -> Raised | str:
    """Rank 1 hangs in its third write until rank 0 has given up on it."""

    def hook(operation: Operation) -> None:
        if operation.number == 2 and dist.get_rank() == 1:
            await_file(given_up)

    storage = FaultyStorage(LocalStorage(), hook, names={"write"})
    error = raised(Job.at(1, storage=storage, timeout=SHORT).save, root, tag="slow")
    if dist.get_rank() == 0:
        Path(given_up).touch()
    dist.barrier()
    left = files(root)
    dist.barrier()
    assert left == [], left
    Job.at(2).save(root, tag="next")
    return error


def test_a_rank_that_hangs_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    given_up = str(tmp_path / "given up")
    results = run_ranks(save_slowly, WORLD, str(root), given_up)
    for rank, error in enumerate(results):
        assert isinstance(error, Raised)
        assert error.kind == "RankTimeoutError"
        assert f"rank {0 if rank == 1 else 1} did not arrive or make progress" in error.text
    assert sorted(os.listdir(root)) == ["latest", "next"]


def save_when_told(root: str) -> Raised:
    job = Job.at(1)
    job.save(f"{root}/checkpoints", tag="good")
    job = Job.at(2, timeout=SHORT)
    Path(f"{root}/ready{dist.get_rank()}").touch()
    await_file(f"{root}/go")
    error = raised(job.save, f"{root}/checkpoints", tag="never")
    Path(f"{root}/done{dist.get_rank()}").touch()
    return error


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_process_counts_as_lost(victim: int, tmp_path: Path) -> None:
    """SIGSTOP: alive, but silent, as a rank whose machine hangs."""
    with start_ranks(save_when_told, WORLD, str(tmp_path)) as ranks:
        for rank in range(WORLD):
            await_file(tmp_path / f"ready{rank}")
        os.kill(ranks.pids[victim], signal.SIGSTOP)
        (tmp_path / "go").touch()
        for rank in {0, 1, 2} - {victim}:
            await_file(tmp_path / f"done{rank}")
        os.kill(ranks.pids[victim], signal.SIGCONT)
        outcomes = ranks.wait(timeout=30)
    for outcome in outcomes:
        assert outcome.status == "returned", outcome.describe()
        assert outcome.value.kind == "RankTimeoutError"
        if outcome.rank != victim:
            assert f"rank {victim} did not arrive" in outcome.value.text
    assert contents(tmp_path / "checkpoints", "good")
    assert not (tmp_path / "checkpoints" / "never").exists()


def test_a_lost_store_ends_a_save_on_every_rank(tmp_path: Path) -> None:
    with start_ranks(save_when_told, WORLD, str(tmp_path)) as ranks:
        for rank in range(WORLD):
            await_file(tmp_path / f"ready{rank}")
        ranks.stop_store()
        (tmp_path / "go").touch()
        outcomes = ranks.wait(timeout=30)
    for outcome in outcomes:
        assert outcome.status == "returned", outcome.describe()
        assert outcome.value.kind == "RankTimeoutError"
        assert f"rank {outcome.rank} lost the rendezvous store" in outcome.value.text
        assert "Nothing was committed" in outcome.value.text
    assert contents(tmp_path / "checkpoints", "good")
    assert not (tmp_path / "checkpoints" / "never").exists()


def lose_store_after_commit(root: str) -> Raised | str:
    """The store ends with the operation that follows the commit, so that rank 0's answer does not arrive."""
    job = Job.at(1)
    job.save(root, tag="tag")
    job.advance()

    def hook(operation: Operation) -> None:
        if operation.path.endswith("/latest"):
            Path(f"{root}/committed").touch()
            await_file(f"{root}/go")

    if dist.get_rank() == 0:
        storage = FaultyStorage(LocalStorage(), hook, names={"put"})
        job = Job.at(2, storage=storage)
    else:
        job = Job.at(2)
    try:
        return job.save(root, tag="tag")
    except RankTimeoutError as error:
        return Raised(type(error).__name__, str(error))


def test_a_store_that_is_lost_after_the_commit_costs_no_file(tmp_path: Path) -> None:
    with start_ranks(lose_store_after_commit, 2, str(tmp_path)) as ranks:
        await_file(tmp_path / "committed")
        ranks.stop_store()
        (tmp_path / "go").touch()
        outcomes = ranks.wait(timeout=30)
    for outcome in outcomes:
        assert outcome.status == "returned", outcome.describe()
    told, lost = (outcome.value for outcome in outcomes)
    assert lost.kind == "RankTimeoutError"
    assert "Whether it was committed is not known here: 'zero-ckpt ls' tells" in lost.text
    # Whether rank 0 sees that its answer was lost is up to the network.
    assert isinstance(told, str) or "not known here" in told.text
    assert contents(tmp_path, "tag")
    assert unlisted(tmp_path, "tag") == []


def save_with_warnings_as_errors(root: str) -> tuple[str, str]:
    """What warns on rank 0 raises there, after the commit, and hurts nobody else."""
    rank = dist.get_rank()
    job = Job.at(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rank == 0 else "ignore")
        try:
            first = job.save(root, tag=f"tag{rank}")
        except UserWarning as warning:
            first = str(warning)
    return first, job.save(root, tag="next")


def test_a_warning_made_an_error_on_one_rank_does_not_stop_the_others(tmp_path: Path) -> None:
    results = run_ranks(save_with_warnings_as_errors, WORLD, str(tmp_path), timeout=30)
    assert "All ranks save to rank 0's" in results[0][0]
    assert results[1][0] == results[2][0] == f"{tmp_path}/tag0"
    assert sorted(os.listdir(tmp_path)) == ["latest", "next", "tag0"]
