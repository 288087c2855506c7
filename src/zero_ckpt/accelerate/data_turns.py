"""One pass over a loader's indices: what is remembered of it, and how an earlier one is repeated.

Owns: `Epoch` (what a checkpoint must know of the pass that was begun last) and `Turn` (one call of
`iter(loader)`), which watches the indices go by. Promises: a repeated pass draws its order from the
generators as they stood when the original began; then the global generators go on from where the
program is. May not touch a generator in an ordinary pass.

Accelerate's loaders fetch one step ahead: when the training gets batch n, batch n + 1 has been read,
and a data set that draws random numbers has drawn them. The repeated pass reads that batch again, so
for it alone the generators go back to where they stood then (`Epoch.fetch`). Loaders with workers
read in other processes; the random streams of those start anew.

Asking Python's and NumPy's generators for their state at every batch would take longer than many a
batch, and few data sets use them: they are watched while the first batches of an epoch are read and
used, and after that only if they have moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zero_ckpt.accelerate import data_states
from zero_ckpt.core import rng

__all__ = ["Epoch", "Position", "Replay", "Turn"]


_WATCHED = 8
"""Batches after which it is known which generators are used."""


@dataclass(frozen=True, slots=True)
class Position:
    """A loader's place as a checkpoint holds it, in steps of this job.

    number: of the epoch that was begun last. yielded: its batches that were handed out, as the
    saving job counted (`saved`) and as this one does. over: nothing of it was left. abandoned: the
    training had left its loop early. start: `capture_start` of it; None when nobody watched. fetch:
    the global generators before the next step's batches were read; stateful: torchdata's state of the
    loader. Both None when there was none, or when the steps of this job are others.
    """

    number: int
    saved: int
    yielded: int
    over: bool
    abandoned: bool
    start: Mapping[str, Any] | None
    fetch: Mapping[str, Any] | None
    stateful: Mapping[str, Any] | None


@dataclass(slots=True)
class Epoch:
    """The pass that was begun last, as it proceeds. Fields as in `Position`, but that `fetch` is not packed yet."""

    number: int
    yielded: int
    start: Mapping[str, Any] | None = None
    fetch: rng.Streams | None = None
    running: bool = True
    over: bool = False


@dataclass(slots=True)
class Replay:
    """How a pass repeats an earlier one.

    now: the global generators as the program left them. hidden: batches of the loader underneath to
    pass over here. target: the first of those that is needed, if anything is skipped (here or by
    Accelerate). fetch: see `Position`. late: the order is drawn at an unknown moment before the first
    batch is handed out, by a stream.
    """

    start: Mapping[str, Any] | None
    now: Mapping[str, Any]
    hidden: int = 0
    target: int | None = None
    fetch: Mapping[str, Any] | None = None
    late: bool = False
    done: bool = False

    def finish(self) -> None:
        """The past is repeated: the global generators go on from the present."""
        if not self.done:
            self.done = True
            rng.restore(self.now)

    def before(self, index: int, width: int) -> None:
        """Batch `index` is fetched next; a step takes `width` of them."""
        if self.done:
            return
        if self.fetch is None or self.target is None:
            if index >= (self.target or 0) and not self.late:
                self.finish()
        elif index == self.target:
            rng.restore(self.fetch)
        elif index >= self.target + width:
            self.finish()


class _Fetches:
    """The global generators before each batch is read, as far as they are used."""

    def __init__(self) -> None:
        self._first: rng.Streams | None = None
        self._count = 0
        self._python = self._numpy = True

    def before(self) -> rng.Streams:
        now = rng.streams(python=self._python, numpy=self._numpy)
        self._count += 1
        if self._first is None:
            self._first = now
        elif self._count == _WATCHED:
            self._python = now.python != self._first.python
            self._numpy = _has_moved(self._first.numpy, now.numpy)
        return now


def _has_moved(before: tuple[Any, ...] | None, after: tuple[Any, ...] | None) -> bool:
    """Whether NumPy's generator has moved. Its state: name, 624 words, place in them, a spare normal number."""
    if before is None or after is None:
        return after is not None
    return before[2:] != after[2:] or bool((before[1] != after[1]).any())


class Turn:
    """One iteration of a loader. `replay`: how it repeats an earlier one; None for an ordinary one."""

    def __init__(self, loader: Any, epoch: Epoch, replay: Replay | None) -> None:
        self._loader = loader
        self.epoch = epoch
        self.replay = replay
        self._stream = data_states.is_stream(loader)
        self._width = data_states.batches_per_step(loader)
        # In the reading process the data set may draw; workers have generators of their own.
        self._fetches = _Fetches() if loader.base_dataloader.num_workers == 0 else None
        if self._stream:
            self._begin()  # it may draw its order as soon as its iterator is made

    def order(self, indices: Iterator[Any]) -> Iterator[Any]:
        """`indices`, watched; the order is drawn when the first is asked for."""
        if not self._stream:
            self._begin()
        replay = self.replay
        hidden = 0 if replay is None else replay.hidden
        for index, batch in enumerate(indices):
            if replay is not None:
                replay.before(index, self._width)
            if index < hidden:
                continue
            if self._fetches is not None and index % self._width == 0:
                self.epoch.fetch = self._fetches.before()
            yield batch
        if replay is not None:
            replay.finish()

    def handed_out(self) -> None:
        """The training gets a batch; what was to be read again has been."""
        if self.replay is not None:
            self.replay.finish()
            self.replay = None
        self.epoch.yielded += 1

    def finished(self) -> None:
        """The training has had all batches."""
        self.epoch.over = True

    def closed(self) -> None:
        """The training has left the loop, early or not."""
        self.epoch.running = False
        if self.replay is not None:
            self.replay.finish()

    def _begin(self) -> None:
        # From here on the loader's own iterator may hold this turn: it must not hold the loader.
        loader, self._loader = self._loader, None
        if self.replay is None:
            self.epoch.start = data_states.capture_start(loader)
            return
        self.epoch.start = self.replay.start
        if self.replay.start is not None:
            data_states.restore_start(loader, self.replay.start)
