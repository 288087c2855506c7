"""One rank's model and optimizer, and contestants that save and load them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import Contestant, peak_memory, remove_and_settle
from benchmarks.ours import Ours
from benchmarks.ranks import Rank
from benchmarks.workload import check, fill, local_tensors, tensors, wipe

Build = Callable[[Rank], tuple[nn.Module, torch.optim.Optimizer]]
Act = Callable[[Path], object]


class Job:
    """Holds the live state. `state` and `parts` are made outside the clock, for the peers."""

    def __init__(self, rank: Rank, build: Build) -> None:
        self.rank = rank
        self.model, self.optimizer = build(rank)
        fill(self.model, self.optimizer)
        self.ours = Ours(self.model, self.optimizer)
        self.state: dict[str, torch.Tensor] = {}
        self.parts: dict[str, torch.Tensor] = {}
        self._look()

    @property
    def local_bytes(self) -> int:
        """Bytes of this rank's part of the state: what a save must write."""
        return sum(part.nbytes for part in self.parts.values())

    def saving(self, name: str, save: Act) -> Contestant:
        """Saves into a folder that does not exist yet and is removed after each round."""
        directory = self.rank.scratch / name

        def clean(_turn: int) -> None:
            self.rank.on_first(lambda: remove_and_settle(directory))

        return Contestant(name, lambda _turn: save(directory), clean=clean)

    def loading(
        self, name: str, directory: Path, load: Act, bring: Callable[[Path], None]
    ) -> Contestant:
        """Loads over zeroes; `bring` puts the folder's files out of or into the page cache."""

        def prepare(_turn: int) -> None:
            self._wipe()
            self.rank.on_first(lambda: bring(directory))

        return Contestant(name, lambda _turn: load(directory), prepare=prepare)

    def resuming(
        self, name: str, directory: Path, load: Act, bring: Callable[[Path], None]
    ) -> Contestant:
        """Loads as a job does that has just started: the optimizer has no state yet, so the load makes it."""
        into_live = self.loading(name, directory, load, bring)

        def prepare(turn: int) -> None:
            into_live.prepare(turn)
            self.optimizer.state.clear()
            self._look()  # lets go of the old state's memory

        return Contestant(name, into_live.run, prepare=prepare, clean=lambda _turn: self._look())

    def checked_load(self, name: str, directory: Path, load: Act) -> float:
        """Loads once and compares every element; returns the load's extra memory in bytes.

        Collective; the worst rank's. Raises RuntimeError when an element differs.
        """
        self._wipe()
        with peak_memory() as peak:
            load(directory)
        check(self.model, self.optimizer, name)
        return self.rank.largest(peak.extra)

    def _wipe(self) -> None:
        wipe(self.model, self.optimizer)
        self._look()

    def _look(self) -> None:
        """A load may have put other tensors into the optimizer's state."""
        self.state = tensors(self.model, self.optimizer)
        self.parts = {name: part for name, part, _ in local_tensors(self.model, self.optimizer)}
