"""Data order: an interrupted epoch goes on as if it had never been interrupted, random draws included."""

from __future__ import annotations

import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch

from tests.accelerate import data_jobs as jobs
from tests.accelerate.data_jobs import Case, Record
from tests.workers import run_ranks
from zero_ckpt.accelerate.data import capture_loaders, skip_first_batches
from zero_ckpt.core import rng
from zero_ckpt.core.objects import decode_objects, encode_objects

CASES = [
    Case(),
    Case(data="quiet"),
    Case(seedable=True),
    Case(generator=True),
    Case(replacement=True),
    Case(split=True),
    Case(rng_types=("torch",)),
    Case(data="stream"),
    Case(dispatch=True),
    Case(dispatch=True, seedable=True),
    Case(dispatch=True, split=True),
    Case(dispatch=True, data="stream"),
    Case(stateful=True),
    Case(stateful=True, seedable=True),
    Case(stateful=True, data="growing"),
    Case(stateful=True, data="stream"),
    Case(stateful=True, dispatch=True),
    Case(stateful=True, dispatch=True, split=True),
]

WITH_WORKERS = [
    Case(workers=2),
    Case(workers=2, seedable=True, persistent=True),
    Case(workers=2, data="stream"),
    Case(workers=2, dispatch=True),
    Case(workers=2, stateful=True),
    Case(workers=2, stateful=True, data="growing"),
]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_resume_is_bitwise(case: Case, world_size: int) -> None:
    for failures in run_ranks(jobs.resumes, world_size, case):
        assert failures == []


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", WITH_WORKERS, ids=str)
def test_resume_with_workers_is_bitwise(case: Case, world_size: int) -> None:
    for failures in run_ranks(jobs.resumes, world_size, case, (2, None), timeout=100):
        assert failures == []


def alone_and(other: Callable[[Case], list[Record]], case: Case) -> tuple[Any, Any]:
    return jobs.uninterrupted(case), other(case)


def check(other: Callable[[Case], list[Record]], case: Case, world_size: int) -> None:
    """`other` sees what a run with Accelerate alone sees."""
    for alone, seen in run_ranks(alone_and, world_size, other, case):
        assert seen == alone


def tracked(case: Case) -> list[Record]:
    return jobs.uninterrupted(case, tracked=True)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [Case(), Case(stateful=True), Case(dispatch=True)], ids=str)
def test_tracking_changes_nothing(case: Case, world_size: int) -> None:
    check(tracked, case, world_size)


def interrupted_twice(case: Case) -> list[Record]:
    """Again in the middle of the epoch that was resumed, and there twice before the next step."""
    first = jobs.interrupted(case, 1, 2)
    accelerator, loader = jobs.prepared(case, seed=7)
    jobs.load(accelerator, first)
    steps = jobs.steps(loader if case.stateful else skip_first_batches(loader, 2), 1, 2)
    records = [next(steps)]
    second = jobs.Saved(capture_loaders(accelerator), rng.capture(), records)
    accelerator, loader = jobs.prepared(case, seed=8)
    jobs.load(accelerator, second)
    third = jobs.Saved(capture_loaders(accelerator), rng.capture(), [])
    left = jobs.rest_of(case, third, 1, 3)
    return first.records + records + left


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(seedable=True),
        Case(dispatch=True),
        Case(stateful=True),
        Case(stateful=True, data="growing"),
    ],
    ids=str,
)
def test_a_resumed_epoch_can_be_interrupted(case: Case, world_size: int) -> None:
    check(interrupted_twice, case, world_size)


def saved_in_last_batch_and_skipped(case: Case) -> list[Record]:
    """The script skips all steps of the epoch, since it was saved while the last was used."""
    length = len(jobs.uninterrupted(case)) // jobs.EPOCHS
    saved = jobs.interrupted(case, 1, length)
    return saved.records + jobs.resumed(case, saved, 1, length)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [Case(), Case(seedable=True), Case(dispatch=True)], ids=str)
def test_nothing_is_left_after_the_last_batch(case: Case, world_size: int) -> None:
    check(saved_in_last_batch_and_skipped, case, world_size)


def passed_over_by_hand(case: Case) -> list[list[int]]:
    """The script does not call `skip_first_batches`, and counts."""
    saved = jobs.interrupted(case, 1, 2)
    seen = jobs.resumed(case, saved, 1)
    return jobs.indices(saved.records) + jobs.indices(seen)[2:]


def by_accelerates_function(case: Case) -> list[list[int]]:
    saved = jobs.interrupted(case, 1, 2)
    rest = jobs.resumed(case, saved, 1, 2, skipper=accelerate.skip_first_batches)
    return jobs.indices(saved.records + rest)


def uninterrupted_indices(case: Case) -> list[list[int]]:
    return jobs.indices(jobs.uninterrupted(case))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("job", [passed_over_by_hand, by_accelerates_function])
@pytest.mark.parametrize("case", [Case(), Case(seedable=True)], ids=str)
def test_every_way_to_skip_gets_the_same_samples(
    case: Case, job: Callable[[Case], list[list[int]]], world_size: int
) -> None:
    alone = run_ranks(uninterrupted_indices, world_size, case)
    length = len(alone[0]) // jobs.EPOCHS
    for mine, other in zip(run_ranks(job, world_size, case), alone, strict=True):
        assert mine[: 2 * length] == other[: 2 * length]


def later_epochs(case: Case) -> list[list[int]]:
    """The epoch after the one that Accelerate's own function resumed, saved in between."""
    saved = jobs.interrupted(case, 1, 2)
    accelerator, loader = jobs.prepared(case, seed=7)
    jobs.load(accelerator, saved)
    list(accelerate.skip_first_batches(loader, 2))
    again = jobs.Saved(capture_loaders(accelerator), rng.capture(), [])
    return jobs.indices(jobs.resumed(case, again, 2))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_epoch_after_accelerates_own_skip_is_the_next(world_size: int) -> None:
    case = Case(seedable=True)
    alone = run_ranks(uninterrupted_indices, world_size, case)
    for mine, other in zip(run_ranks(later_epochs, world_size, case), alone, strict=True):
        assert mine == other[-len(mine) :]


def left_and_iterated(case: Case) -> tuple[list[Record], list[Record]]:
    """A loop left early, and the next one: in the same program, and in one that was resumed."""
    saved = jobs.left_early(case, 0, 2)
    _, loader = jobs.prepared(case, seed=1)
    for step, _ in enumerate(jobs.steps(loader, 0), start=1):
        if step == 2:
            break
    return list(jobs.steps(loader, 1)), list(jobs.steps(_loaded(case, saved), 1))


def _loaded(case: Case, saved: jobs.Saved) -> Any:
    accelerator, loader = jobs.prepared(case, seed=7)
    jobs.load(accelerator, saved)
    return loader


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [Case(), Case(seedable=True)], ids=str)
def test_after_a_loop_left_early_comes_what_would_have_come(case: Case, world_size: int) -> None:
    for alone, seen in run_ranks(left_and_iterated, world_size, case):
        assert seen == alone


def left_and_skipped(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    whole = jobs.uninterrupted(case)
    saved = jobs.left_early(case, 1, 2)
    left = jobs.resumed(case, saved, 1, 2)
    return jobs.indices(whole), jobs.indices(saved.records + left)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [Case(), Case(seedable=True)], ids=str)
def test_a_loop_left_early_goes_on_when_it_is_skipped_to(case: Case, world_size: int) -> None:
    for alone, seen in run_ranks(left_and_skipped, world_size, case):
        assert seen == alone


def set_to_another_epoch(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    """The script was saved in epoch 1 and goes on with epoch 2."""
    whole = jobs.indices(jobs.uninterrupted(case))
    loader = _loaded(case, jobs.interrupted(case, 1, 2))
    loader.set_epoch(2)
    return whole[-len(whole) // jobs.EPOCHS :], jobs.indices(list(jobs.steps(loader, 2)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_script_that_sets_the_epoch_gets_that_epoch(world_size: int) -> None:
    for alone, seen in run_ranks(set_to_another_epoch, world_size, Case(seedable=True)):
        assert seen == alone


def pickled_on_the_way(case: Case) -> tuple[list[Record], list[Record]]:
    _, loader = jobs.prepared(case, seed=1)
    list(jobs.steps(loader, 0))
    copy = pickle.loads(pickle.dumps(loader))
    before = rng.capture()
    mine = list(jobs.steps(loader, 1))
    rng.restore(before)
    return mine, list(jobs.steps(copy, 1))


@pytest.mark.parametrize("case", [Case(), Case(dispatch=True, seedable=True)], ids=str)
def test_a_tracked_loader_can_be_pickled(case: Case) -> None:
    ((mine, copy),) = run_ranks(pickled_on_the_way, 1, case)
    assert copy == mine


def stored_and_read(case: Case) -> list[str]:
    """What a checkpoint does with the state, without `weights_only=False`."""
    saved = jobs.interrupted(case, 1, 2)
    stored = encode_objects(saved.tree, "")
    tree = decode_objects(
        stored.json, stored.entries.__getitem__, dtensor=stored.dtensors.__getitem__
    )
    whole = jobs.uninterrupted(case)
    again = jobs.Saved(tree, saved.rng, [])
    return [] if saved.records + jobs.rest_of(case, again, 1, 2) == whole else ["another order"]


@pytest.mark.parametrize("case", [Case(), Case(stateful=True, data="growing")], ids=str)
def test_the_state_is_stored_without_pickle(case: Case) -> None:
    assert run_ranks(stored_and_read, 1, case) == [[]]


def forgotten(case: Case) -> list[bool]:
    """Whether a loader, and one that skips, are gone at once: before, while and after they are iterated."""
    gone = []
    for steps in (0, 2, None):
        accelerator, loader = jobs.prepared(case, seed=1)
        skipping = skip_first_batches(loader, 1)
        references = [weakref.ref(loader), weakref.ref(skipping)]
        for each in (loader, skipping):
            list(itertools.islice(jobs.steps(each, 0), steps))
        accelerator._dataloaders.clear()
        del accelerator, loader, skipping, each
        gone += [reference() is None for reference in references]
    return gone


@pytest.mark.parametrize("case", [Case(), Case(dispatch=True), Case(stateful=True)], ids=str)
def test_a_forgotten_loader_is_freed_at_once(case: Case) -> None:
    assert run_ranks(forgotten, 1, case) == [[True] * 6]


def _gathered(case: Case) -> Any:
    accelerator, loader = jobs.prepared(case, 1)
    whole = [len(accelerator.gather_for_metrics(batch)) for batch in loader]
    rest = skip_first_batches(loader, 1)
    again = skip_first_batches(rest, 1)
    return (
        whole,
        [len(accelerator.gather_for_metrics(batch)) for batch in rest],
        [len(accelerator.gather_for_metrics(batch)) for batch in again],
    )


@pytest.mark.parametrize(
    "case",
    [Case(samples=21), Case(samples=21, dispatch=True), Case(samples=21, split=True)],
    ids=str,
)
def test_metrics_of_the_rest_of_an_epoch_count_no_sample_twice(case: Case) -> None:
    for whole, rest, again in run_ranks(_gathered, 2, case):
        assert sum(whole) == case.samples
        assert (rest, again) == (whole[1:], whole[2:])


def test_workers_that_cannot_be_started_leave_generators_and_tracking_as_they_were() -> None:
    _, loader = jobs.prepared(Case(), 1)
    tracker, before = loader._zero_tracker, torch.get_rng_state()

    def fail() -> None:
        torch.rand(1)
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more processes"):
        tracker._quietly(fail)
    assert torch.equal(torch.get_rng_state(), before)
    next(iter(loader))
    assert tracker.epoch.start is not None
