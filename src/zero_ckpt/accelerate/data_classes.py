"""The classes that make a prepared loader and its batch sampler tell where they are.

Owns: `track`, which changes the class of both objects to a subclass of their own. Promises: to others
they are what they were; an ordinary epoch yields the same and draws the same random numbers; a
tracked loader can be pickled. The batch sampler is watched too, since Accelerate's own
`skip_first_batches` makes another loader over it.

Each class is made from the object's own and from nothing else, so that an object may change into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

from zero_ckpt.accelerate import data_states
from zero_ckpt.accelerate.data_tracking import Tracker
from zero_ckpt.core import rng

__all__ = ["can_track", "is_tracked", "track"]

_set_class = vars(object)["__class__"].__set__  # Accelerate's loaders hide theirs behind a property


def can_track(loader: Any) -> bool:
    """Whether `track` knows this kind of loader."""
    return issubclass(type(loader), (DataLoaderShard, DataLoaderDispatcher))


def is_tracked(loader: Any) -> bool:
    """Whether `track` was called with this loader."""
    return can_track(loader) and "_zero_tracker" in vars(loader)


def track(loader: Any, source: Any = None, skip: int | None = None) -> None:
    """Make a prepared loader tell where it is. With `source`: `loader` is that one without its first `skip` batches."""
    if is_tracked(loader):
        return
    kind: Any = type(loader)
    _set_class(loader, _tracked(kind))
    loader._zero_skip, loader._zero_source = skip, source
    if source is None:
        loader._zero_tracker = Tracker(loader)
        loader._zero_tracker.watched = _watch(loader)
    else:
        loader._zero_tracker = source._zero_tracker


def _watch(loader: Any) -> bool:
    """Let the loader's batch sampler tell its tracker. False where its class cannot be changed."""
    sampler = data_states.index_sampler(loader)
    try:
        if "_zero_tracker" not in vars(sampler):
            kind: Any = type(sampler)
            sampler.__class__ = _watched(kind)
        sampler._zero_tracker = loader._zero_tracker
    except TypeError:
        return False  # a list, for example, whose order is fixed
    base = loader.base_dataloader
    if getattr(base, "_initial_iter_for_state_dict", False):
        _renew_first_iterator(base)
    return True


def _renew_first_iterator(base: Any) -> None:
    """A stateful loader makes its first iterator when it is made: that one is not watched.

    With workers it has also drawn its order, on each process from a generator of its own.
    """
    base.load_state_dict({})
    if base.num_workers == 0:
        before = rng.capture()
        base.state_dict()
        rng.restore(before)


@cache
def _tracked(original: Any) -> type:
    class Tracked(original):  # type: ignore[misc]
        """A loader that tells its tracker of every batch.

        `_zero_skip`: batches that it leaves out, of `_zero_source`, which it keeps alive; both None
        for the prepared loader itself.
        """

        _zero_tracker: Tracker
        _zero_skip: int | None
        _zero_source: Any

        def __iter__(self) -> Iterator[Any]:
            tracker = self._zero_tracker
            turn = tracker.begin(self)
            if turn is None:
                return
            try:
                for batch in super().__iter__():
                    tracker.started()
                    turn.handed_out()
                    yield batch
                turn.finished()
                if tracker.loader.iteration == turn.epoch.number:
                    tracker.loader.iteration = self.iteration
            finally:
                tracker.closed(turn)

        def __reduce__(self) -> Any:
            kind, arguments, *rest = super().__reduce__()
            return (_tracked_again, (kind, arguments), *rest)

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(state)
            if self._zero_source is None:
                self._zero_tracker.bind(self)

    if issubclass(original, DataLoaderDispatcher):
        return _named_like(_telling_between_steps(Tracked), original)
    return _named_like(Tracked, original)


def _telling_between_steps(original: Any) -> type:
    class Dispatcher(original):  # type: ignore[misc]
        """A dispatcher whose state for torchdata is the one between two steps.

        Accelerate takes it before the last fetch of a step and then corrects its numbers, which works
        neither for `split_batches` nor for workers.
        """

        _zero_step_begins = False

        def _fetch_batches(self, iterator: Any) -> Any:
            self._zero_step_begins = True
            return super()._fetch_batches(iterator)

        def _update_state_dict(self) -> None:
            if self._zero_step_begins or self.end_of_dataloader:
                super()._update_state_dict()
            self._zero_step_begins = False

        def adjust_state_dict_for_prefetch(self) -> None:
            """Nothing: the state was taken at the right moment."""

    return Dispatcher


@cache
def _watched(original: Any) -> type:
    class Watched(original):  # type: ignore[misc]
        """A batch sampler that tells its loader's tracker when it is iterated."""

        _zero_tracker: Tracker

        def __iter__(self) -> Iterator[Any]:
            return _lazily(self._zero_tracker, super().__iter__())

        def __reduce_ex__(self, protocol: Any) -> Any:
            function, arguments, *rest = super().__reduce_ex__(max(2, protocol))
            plain = [original if each is type(self) else each for each in arguments]
            return (_watched_again, (function, plain, original), *rest)

    return _named_like(Watched, original)


def _lazily(tracker: Tracker, indices: Iterator[Any]) -> Iterator[Any]:
    """The indices, of which the tracker is told when the first is asked for: a loader may make iterators in vain."""
    yield from tracker.indices(indices)


def _named_like(made: type, original: type) -> type:
    made.__module__, made.__qualname__ = original.__module__, original.__qualname__
    made.__name__ = original.__name__
    return made


def _tracked_again(kind: type, arguments: tuple[Any, ...]) -> Any:
    loader = kind(*arguments)
    _set_class(loader, _tracked(kind))
    return loader


def _watched_again(function: Any, arguments: list[Any], kind: type) -> Any:
    sampler = function(*arguments)
    sampler.__class__ = _watched(kind)
    return sampler
