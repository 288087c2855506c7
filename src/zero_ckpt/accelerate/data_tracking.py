"""Where a prepared loader is, and what it does when it is iterated next.

Owns: the `Tracker` of a loader, which is told of every iteration of the loader, of those that skip
its first batches, and of its batch sampler, and which decides whether that repeats a pass that was
interrupted. May not draw random numbers that the untracked loader would not draw.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.data_loader import SkipBatchSampler
from accelerate.state import GradientState

from zero_ckpt.accelerate import data_states
from zero_ckpt.accelerate.data_turns import Epoch, Position, Replay, Turn
from zero_ckpt.core import rng

__all__ = ["Tracker"]


class Tracker:
    """Where one prepared loader is; shared with its batch sampler and with the loaders that skip its first batches.

    It keeps no loader alive: Accelerate's users free theirs, with what they hold, by forgetting them.
    """

    def __init__(self, loader: Any) -> None:
        self.bind(loader)
        self.epoch: Epoch | None = None
        self.pending: Position | None = None
        self.watched = False  # whether the batch sampler tells
        self.respawn = False  # the saving job's workers had been started in an earlier epoch
        self._turn: Turn | None = None  # begun, its first index not yet asked for
        self._other: weakref.ref[Any] | None = None  # an untracked loader that runs the epoch
        self._view: weakref.ref[Any] | None = None  # the tracked loader that runs the epoch
        self._muted = False

    def bind(self, loader: Any) -> None:
        """`loader` is the prepared one."""
        self._loader: weakref.ref[Any] | None = weakref.ref(loader)

    def __getstate__(self) -> dict[str, Any]:
        here = ("_loader", "_turn", "_other", "_view")
        return {**self.__dict__, **dict.fromkeys(here)}

    @property
    def loader(self) -> Any:
        """The prepared loader; None when it is gone."""
        return None if self._loader is None else self._loader()

    @property
    def has_handed_out_all(self) -> bool:
        """Whether the batch that the training has is the last one of the epoch."""
        view = None if self._view is None else self._view()
        return view is not None and bool(view.end_of_dataloader)

    @property
    def stateful(self) -> bool:
        """Whether the loader continues by itself (`use_stateful_dataloader`)."""
        return hasattr(self.loader.base_dataloader, "load_state_dict")

    @property
    def delegated(self) -> bool:
        """Whether torchdata's own state is needed: samplers or data with a state, streams."""
        parts = [self.loader.dataset, *data_states.samplers(self.loader)]
        own = any(hasattr(part, "load_state_dict") for part in parts)
        return self.stateful and (own or not self.watched or data_states.is_stream(self.loader))

    def begin(self, view: Any) -> Turn | None:
        """A turn, since `view` (the loader, or one that skips its first batches) is iterated; None if it is empty."""
        self.settle()
        position, self.pending = self._applicable(view), None
        skip = view._zero_skip
        if position is not None and position.over:
            if skip == position.yielded:
                return None
            position = None
        if view is self.loader and self.respawn:
            self.respawn = False
            self._start_workers()
        replay = None if position is None else self._replay(position, skip)
        yielded = skip or 0
        if position is not None and skip is None and self.stateful:
            yielded = position.yielded
        self.epoch, self._view = Epoch(view.iteration, yielded), weakref.ref(view)
        self._turn = turn = Turn(view, self.epoch, replay)
        return turn

    def _applicable(self, view: Any) -> Position | None:
        position = self.pending
        if position is None or position.over:
            return position
        if position.number != view.iteration:
            return None  # the program has gone on to another epoch (`set_epoch`)
        # What was left early goes on only when asked to, as it would in the job that left it.
        continues = self.stateful or view._zero_skip
        return None if position.abandoned and not continues else position

    def _replay(self, position: Position, skip: int | None) -> Replay:
        width = data_states.batches_per_step(self.loader)
        late = data_states.is_stream(self.loader)
        replay = Replay(position.start, rng.capture(), late=late)
        if skip is not None:
            replay.target = skip * width
        elif self.stateful:
            replay.target = position.yielded * width
            replay.hidden = 0 if self.delegated else replay.target
        # (torchdata reads a stream up to its place in its own way.)
        if replay.target == position.yielded * width and not (late and self.delegated):
            replay.fetch = position.fetch
        return replay

    def continue_stateful(self, position: Position | None) -> None:
        """Hand torchdata the state that `position` has, or an empty one; its present iterator is dropped."""
        base = self.loader.base_dataloader
        state = None if position is None else position.stateful
        base.load_state_dict({} if state is None else dict(state))
        if position is not None and state is not None and position.over:
            # It makes an iterator of the state, and then another: only the second's draws count.
            self._quietly(base.state_dict)

    def forget(self) -> None:
        """Forget what has been until now: a checkpoint is loaded."""
        self.epoch = self._turn = self._other = self._view = self.pending = None

    def started(self) -> None:
        """The turn that was begun has its first batch."""
        self._turn = None

    def closed(self, turn: Turn) -> None:
        """A turn has come to its end, or was left."""
        turn.closed()
        self._turn = self._view = None

    def indices(self, indices: Iterator[Any]) -> Iterator[Any]:
        """`indices`, watched where they belong to a pass over the loader: the batch sampler is iterated."""
        turn, self._turn = self._turn, None
        if turn is None and not self._muted and self.loader is not None:
            turn = self._turn_of_other()
        return indices if turn is None or self._muted else turn.order(indices)

    def _turn_of_other(self) -> Turn | None:
        """A turn for Accelerate's own `skip_first_batches`; None when it is no loader that iterates."""
        outer = data_states.index_sampler(self.loader)
        for other in GradientState().dataloader_references:
            sampler = None if other is None else data_states.index_sampler(other)
            if isinstance(sampler, SkipBatchSampler) and sampler.batch_sampler is outer:
                return self._adopt(other)
        return None

    def _adopt(self, other: Any) -> Turn:
        self.settle()
        position, self.pending = self.pending, None
        replay = None
        if position is not None and not position.over and position.number == other.iteration:
            late = data_states.is_stream(other)
            replay = Replay(position.start, rng.capture(), late=late)
        self._other = weakref.ref(other)
        self.epoch = Epoch(other.iteration, 0)
        return Turn(other, self.epoch, replay)

    def settle(self) -> None:
        """Note how far an untracked loader has come with its epoch."""
        if self._other is None or self.epoch is None:
            return
        other = self._other()
        self.epoch.over = (
            other is None or other.end_of_dataloader or other.iteration > self.epoch.number
        )
        if other is None or other.iteration > self.epoch.number:
            self._other = None
            self.epoch.running = False
            if self.loader.iteration == self.epoch.number:
                self.loader.iteration += 1

    def _start_workers(self) -> None:
        base = self.loader.base_dataloader
        if base.persistent_workers and base._iterator is None:
            self._quietly(base.__iter__)

    def _quietly(self, action: Callable[[], Any]) -> None:
        """Do it and leave every generator as it is."""
        before = data_states.capture_start(self.loader)
        self._muted = True
        try:
            action()
        finally:
            self._muted = False
            data_states.restore_start(self.loader, before)
