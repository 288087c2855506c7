"""Data order at another number of processes: the same samples in the same order, counted in samples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.accelerate import data_jobs as jobs
from tests.accelerate.data_jobs import Case, Record, Saved
from tests.workers import run_ranks

EVEN = 24  # samples: a whole number of steps on 1, 2 and 4 processes

CASES = [
    Case(samples=EVEN),
    Case(samples=EVEN, seedable=True),
    Case(samples=EVEN, generator=True),
    Case(samples=EVEN, dispatch=True),
    Case(samples=EVEN, stateful=True),
    Case(samples=EVEN, stateful=True, dispatch=True),
]


def in_order(ranks: list[list[Record]], epoch: int) -> list[int]:
    """An epoch's samples in the order of the sampler: a step's batches, rank after rank."""
    by_rank = [jobs.indices([r for r in records if r[0] == epoch]) for records in ranks]
    return [i for step in zip(*by_rank, strict=True) for batch in step for i in batch]


def elsewhere(
    case: Case, saved: Saved, saved_ranks: int, epoch: int, skip: int
) -> tuple[list[Record], list[str]]:
    """The rest at this number of processes; `skip` is what the script of the saving job would skip."""
    accelerator, loader = jobs.prepared(case, seed=77)
    notices = jobs.load(accelerator, saved, saved_ranks)
    return jobs.rest(loader, epoch, 0 if case.stateful else skip), notices


def resumed_at(
    case: Case, ranks: tuple[int, int], epoch: int, step: int | None, other: Case | None = None
) -> tuple[list[list[Record]], list[list[Record]], list[str]]:
    """What an uninterrupted job sees, what the resumed one does, and what its user is told."""
    before, after = ranks
    whole = run_ranks(jobs.uninterrupted, before, case)
    saved = run_ranks(jobs.interrupted, before, case, epoch, step)[0]
    start = (epoch, step) if step else (epoch + 1, 0)
    rest = run_ranks(elsewhere, after, other or case, saved, before, *start)
    return whole, [records for records, _ in rest], rest[0][1]


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_epoch_continues_at_its_sample(case: Case, ranks: tuple[int, int]) -> None:
    step = 2 if ranks[0] == 2 else 4
    whole, rest, notices = resumed_at(case, ranks, 1, step)
    assert in_order(rest, 1) == in_order(whole, 1)[8:]
    assert "epoch continues" in notices[0]
    assert "again" not in notices[0]


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_next_epoch_has_its_order(case: Case, ranks: tuple[int, int]) -> None:
    whole, rest, notices = resumed_at(case, ranks, 1, None)
    assert in_order(rest, 2) == in_order(whole, 2)
    assert notices == []


@pytest.mark.parametrize("case", [Case(samples=EVEN), Case(samples=EVEN, seedable=True)], ids=str)
def test_later_epochs_have_their_order_on_fewer_processes(case: Case) -> None:
    whole, rest, _ = resumed_at(case, (2, 1), 1, 2)
    assert in_order(rest, 2) == in_order(whole, 2)


def test_a_place_within_a_step_goes_back_to_its_begin() -> None:
    case = Case(samples=EVEN, stateful=True)
    whole, rest, notices = resumed_at(case, (2, 4), 1, 3)
    assert in_order(rest, 1) == in_order(whole, 1)[8:]
    assert "4 samples before that come again" in notices[0]


def test_another_batch_size_continues_at_the_sample() -> None:
    case = Case(samples=EVEN)
    whole, rest, notices = resumed_at(case, (2, 1), 1, 2, other=replace(case, batch_size=4))
    assert in_order(rest, 1) == in_order(whole, 1)[8:]
    assert notices  # the random streams are others


def test_what_only_torchdata_knows_begins_the_epoch_again() -> None:
    case = Case(samples=EVEN, stateful=True, data="growing")
    whole, rest, notices = resumed_at(case, (2, 1), 1, 2)
    assert in_order(rest, 1) == in_order(whole, 1)
    assert "begins again" in notices[0]


def more_loaders(case: Case, saved: Saved) -> tuple[list[Record], list[str]]:
    accelerator, loader = jobs.prepared(case, seed=77)
    accelerator.prepare(jobs.raw_loader(case, 5))
    notices = jobs.load(accelerator, saved)
    return jobs.rest(loader, 2), notices


def test_another_number_of_loaders_is_told() -> None:
    case = Case()
    (whole,) = run_ranks(jobs.uninterrupted, 1, case)
    (saved,) = run_ranks(jobs.interrupted, 1, case, 1, None)
    ((rest, notices),) = run_ranks(more_loaders, 1, case, saved)
    assert saved.records + rest == whole
    assert len(notices) == 1
    assert notices[0].startswith(
        "1 data loaders were prepared when the checkpoint was saved, and 2 are now"
    )


def test_another_data_set_is_told() -> None:
    (saved,) = run_ranks(jobs.interrupted, 1, Case(samples=8), 1, None)
    ((_, notices),) = run_ranks(elsewhere, 1, Case(samples=6), saved, 1, 2, 0)
    assert len(notices) == 1
    assert notices[0].startswith("Data loader 0: an epoch has 6 samples, and had 8 when")
