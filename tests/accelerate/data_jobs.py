"""A training loop in small, for tests of the place in the data: it notes all that it gets.

`uninterrupted` runs it with Accelerate alone. `interrupted` runs it up to a place, where it does what
`save_state` does with the data; `resumed` goes on in a program with other seeds, as a script that was
started again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from zero_ckpt.accelerate.data import (
    capture_loaders,
    plan_loaders,
    skip_first_batches,
    track_loaders,
)
from zero_ckpt.core import rng

Record = tuple[int, int, tuple[float, ...]]  # epoch, step, all that was seen in it
EPOCHS = 3


@dataclass(frozen=True)
class Case:
    """A way to load data."""

    seedable: bool = False
    stateful: bool = False
    dispatch: bool = False
    split: bool = False
    workers: int = 0
    persistent: bool = False
    data: str = "numbers"
    samples: int = 22
    batch_size: int = 2
    generator: bool = False
    replacement: bool = False
    rng_types: tuple[str, ...] = ("generator",)

    def __str__(self) -> str:
        default = Case()
        names = vars(default)
        told = [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != names[n]]
        return " ".join(told).replace("=True", "") or "default"


@dataclass(frozen=True)
class Saved:
    """What a save keeps of one rank."""

    tree: dict[str, Any]
    rng: dict[str, Any]
    records: list[Record]


class Numbers(Dataset[torch.Tensor]):
    """Sample i is i and, read in the training's process, three random numbers."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return self.case.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        return sample(index, noisy=not self.case.workers and self.case.data != "quiet")


class Growing(Numbers):
    """A data set with a state: how often each rank has read from it."""

    reads = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        return torch.tensor([float(index), float(self.reads), 0.0, 0.0])

    def state_dict(self) -> dict[str, Any]:
        return {"reads": self.reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reads = state["reads"]


class Stream(IterableDataset[torch.Tensor]):
    """Numbers in an order that is drawn when the stream begins."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return self.case.samples

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        order = torch.randperm(self.case.samples).tolist()
        for index in order if worker is None else order[worker.id :: worker.num_workers]:
            yield torch.tensor([float(index)] + [0.0] * 3)


def sample(index: int, *, noisy: bool) -> torch.Tensor:
    noise = [torch.rand(()).item(), random.random(), numpy.random.rand()] if noisy else [0.0] * 3
    return torch.tensor([float(index), *noise], dtype=torch.float64)


def prepared(case: Case, seed: int, *, tracked: bool = True) -> tuple[Accelerator, Any]:
    """An accelerator in a program that has just started, and its loader."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = DataLoaderConfiguration(
        split_batches=case.split,
        dispatch_batches=case.dispatch,
        use_seedable_sampler=case.seedable,
        use_stateful_dataloader=case.stateful,
    )
    accelerator = Accelerator(cpu=True, dataloader_config=config, rng_types=list(case.rng_types))
    set_seed(seed)
    loader = accelerator.prepare(raw_loader(case, seed))
    if case.rng_types == ("generator",):
        set_seed(seed + accelerator.process_index)  # every rank its own stream
    if tracked:
        track_loaders(accelerator)
    return accelerator, loader


def raw_loader(case: Case, seed: int) -> DataLoader[torch.Tensor]:
    options: dict[str, Any] = {
        "num_workers": case.workers,
        "persistent_workers": case.persistent,
        "multiprocessing_context": "fork" if case.workers else None,
    }
    generator = torch.Generator().manual_seed(seed) if case.generator else None
    if case.data == "stream":
        return DataLoader(Stream(case), batch_size=case.batch_size, **options)
    data = Growing(case) if case.data == "growing" else Numbers(case)
    if case.replacement:
        draws = RandomSampler(data, replacement=True, generator=generator)
        return DataLoader(data, sampler=draws, batch_size=case.batch_size, **options)
    options["generator"] = generator
    return DataLoader(data, batch_size=case.batch_size, shuffle=True, **options)


def steps(loader: Any, epoch: int, first: int = 0) -> Iterator[Record]:
    """One epoch of training: a step uses a batch, and draws a random number."""
    for step, batch in enumerate(loader, start=first):
        yield epoch, step, (*batch.flatten().tolist(), torch.rand(()).item())


def uninterrupted(case: Case, seed: int = 1, *, tracked: bool = False) -> list[Record]:
    """All epochs."""
    _, loader = prepared(case, seed, tracked=tracked)
    return [record for epoch in range(EPOCHS) for record in steps(loader, epoch)]


def interrupted(case: Case, epoch: int, step: int | None, seed: int = 1) -> Saved:
    """Up to a save after `step` batches of `epoch`, or after all of it."""
    accelerator, loader = prepared(case, seed)
    records: list[Record] = []
    for number in range(epoch + 1):
        for record in steps(loader, number):
            records.append(record)
            if (number, record[1] + 1) == (epoch, step):
                return _saved(accelerator, records)
    return _saved(accelerator, records)


def left_early(case: Case, epoch: int, step: int, seed: int = 1) -> Saved:
    """The same, but the save comes after a `break`."""
    accelerator, loader = prepared(case, seed)
    records: list[Record] = []
    for number in range(epoch + 1):
        for record in steps(loader, number):
            records.append(record)
            if (number, record[1] + 1) == (epoch, step):
                break
    return _saved(accelerator, records)


def _saved(accelerator: Accelerator, records: list[Record]) -> Saved:
    return Saved(capture_loaders(accelerator), rng.capture(), records)


def load(accelerator: Accelerator, saved: Saved, world_size: int | None = None) -> list[str]:
    """What `load_state` does with the data."""
    same_ranks = world_size in (None, accelerator.num_processes)
    install = plan_loaders(accelerator, saved.tree, same_ranks)
    notices = install()
    rng.restore(saved.rng)
    return notices


def resumed(
    case: Case, saved: Saved, epoch: int, skip: int = 0, *, skipper: Any = skip_first_batches
) -> list[Record]:
    """The rest, from `epoch`; its first `skip` batches are skipped as Accelerate's users do it."""
    accelerator, loader = prepared(case, seed=77)
    load(accelerator, saved)
    return rest(loader, epoch, skip, skipper=skipper)


def rest(
    loader: Any, epoch: int, skip: int = 0, first: int = 0, *, skipper: Any = skip_first_batches
) -> list[Record]:
    active = skipper(loader, skip) if skip else loader
    records = list(steps(active, epoch, skip or first))
    for later in range(epoch + 1, EPOCHS):
        records += steps(loader, later)
    return records


def resumes(case: Case, places: tuple[int | None, ...] = (1, -2, -1, None)) -> list[str]:
    """Resume from `places` of epoch 1 (steps; negative: from its end, so that -1 is after the last; None: after the
    loop). Returns what went wrong.

    What should have been is a run with Accelerate alone. Only a stateful loader with workers is
    compared with a tracked one: alone, each process shuffles it in its own way.
    """
    whole = uninterrupted(case, tracked=case.stateful and case.workers > 0)
    length = 1 + max(step for _, step, _ in whole)
    failures = []
    for place in places:
        step = place if place is None or place > 0 else length + 1 + place
        saved = interrupted(case, 1, step)
        over = step in (length, None)
        got = saved.records + rest_of(case, saved, 2 if over else 1, 0 if over else step or 0)
        if got != whole:
            failures.append(
                f"saved after {step} of {length} steps: {_first_difference(got, whole)}"
            )
    return failures


def rest_of(case: Case, saved: Saved, epoch: int, done: int) -> list[Record]:
    if not case.stateful:
        return resumed(case, saved, epoch, done)
    accelerator, loader = prepared(case, seed=77)
    load(accelerator, saved)
    return rest(loader, epoch, first=done)


def _first_difference(got: list[Record], whole: list[Record]) -> str:
    for mine, other in zip(got, whole, strict=False):
        if mine != other:
            return f"{mine} and not {other}"
    return f"{len(got)} steps and not {len(whole)}"


def indices(records: list[Record]) -> list[list[int]]:
    """What samples each step had, without the random numbers."""
    return [[int(value) for value in seen[:-1][::4]] for _, _, seen in records]
