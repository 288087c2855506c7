"""Training data loaders that continue in the middle of an epoch.

Owns what a loader must remember so that a resumed epoch yields exactly the batches that were left. Lightning itself
continues only its batch counter: an ordinary `DataLoader` would start again at its first batch.

A `torch.utils.data.DataLoader` gets the interface that Lightning calls "stateful" (`state_dict`, `load_state_dict`) by
changing its class to a subclass, so that whoever looks at it sees the same loader. A loader that is already stateful is
left alone. Batches are skipped by their indices, nothing is read for them; a stream (`IterableDataset`) has to be read.
Workers' own random streams (augmentation under `num_workers > 0`) start anew.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType, NoneType
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from zero_ckpt.core import rng
from zero_ckpt.core.shapes import Shape
from zero_ckpt.lightning.loader_rng import MOMENT, own_states, put_back, set_own_states, states
from zero_ckpt.lightning.pending_rng import PendingRng

__all__ = ["LOADER", "ResumableLoader", "can_resume", "make_reloaded", "make_resumable"]

LOADER: Shape = {
    "yielded": int,
    "epoch": (int, NoneType),
    "seed": (int, NoneType),
    "reused": bool,
    "start": lambda moment: MOMENT if moment else dict,
    "first": lambda moment: MOMENT if moment else dict,
    "generators": {str: rng.check_generator},
}
"""A loader's place in a checkpoint: see `ResumableLoader.state_dict`."""


def _nobody() -> None:
    """The trainer of a loader that was given to none."""


class _SkipFirst:
    """A loader's index sampler without its first `count` items, for the first iterator that is used.

    (A loader with workers makes two iterators and uses the second.)
    """

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler = sampler
        self._count = count
        self._latest: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        self._latest = iter(self._sampler)
        return self._without_first(self._latest)

    def __len__(self) -> int:
        return len(self._sampler)

    def skip(self) -> None:
        """Skip now, in the iterator made last: so that its order is drawn before the random stream moves on."""
        count, self._count = self._count, 0
        for _ in islice(self._latest, count):
            pass

    def _without_first(self, iterator: Iterator[Any]) -> Iterator[Any]:
        self.skip()
        yield from iterator


class _CountingIterator:
    """A loader's iterator that counts its batches, and keeps how the generators stood before the first.

    Only then does a sampler draw its order.
    """

    def __init__(self, loader: ResumableLoader, iterator: Any, count: int) -> None:
        self._loader = loader
        self._iterator = iterator
        self._pending = loader._zero_pending
        self.count = count

    def __reduce_ex__(self, protocol: Any) -> Any:
        """None in a copy of the trainer within fit, as Lightning has it with iterators of a `DataLoader`."""
        return type(None), ()

    def __iter__(self) -> _CountingIterator:
        return self

    def __next__(self) -> Any:
        if self._pending is not None:
            self._pending.before_fetch()
        if self.count == 0:
            self._loader._zero_first = states(self._loader)
        batch = next(self._iterator)
        self.count += 1
        return batch

    def __len__(self) -> int:
        return len(self._iterator)


class ResumableLoader(DataLoader[Any]):
    """What `make_resumable` turns a `DataLoader` into.

    Lightning may construct one, when it makes a loader anew for another run (`predict` after `fit`): bound to nothing.
    """

    _zero_counter: _CountingIterator | None = None
    _zero_position: Mapping[str, Any] | None = None
    _zero_start: Mapping[str, Any] = MappingProxyType({})  # generators before the iterator was made
    _zero_first: Mapping[str, Any] = MappingProxyType({})  # and before its first batch
    _zero_pending: PendingRng | None = None
    _zero_in_epoch: bool = False
    _zero_reused: bool = False  # persistent workers' iterator of an earlier epoch
    _zero_skipper: _SkipFirst | None = None
    _zero_given: Mapping[str, Any] | None = None  # the position that it was bound with
    _zero_twice: bool = False
    _zero_trainer: Callable[[], Any] = staticmethod(_nobody)

    def zero_belong(self, trainer: Any) -> None:
        """Only what `trainer` iterates to train is a place. (It may validate with the same loader within the epoch.)"""
        self._zero_trainer = weakref.ref(trainer)

    def zero_bind(
        self,
        pending: PendingRng | None,
        position: Mapping[str, Any] | None,
        *,
        in_epoch: bool,
        twice: bool = False,
    ) -> None:
        """Continue from `position` (an earlier `state_dict()`) when iterated next.

        in_epoch: its epoch was not finished; otherwise only the order of later epochs is continued.
        twice: the original made two iterators where this loader makes one.
        """
        self._zero_pending = pending
        self._zero_position = self._zero_given = position
        self._zero_in_epoch = in_epoch
        self._zero_twice = twice
        self._zero_start = {}
        self._zero_first = {}
        self._zero_counter = None
        self._zero_skipper = None
        self._zero_reused = False

    def state_dict(self) -> dict[str, Any]:
        """Batches handed out in this epoch, and the generators when it began and now."""
        return {
            "zero_ckpt_loader": 1,
            "yielded": 0 if self._zero_counter is None else self._zero_counter.count,
            "epoch": _number(self.sampler, "epoch"),
            "seed": _number(self.sampler, "seed"),
            "reused": self._zero_reused,
            "start": dict(self._zero_start),
            "first": dict(self._zero_first),
            "generators": own_states(self),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: the strategy binds the position itself, in cases where Lightning would not."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the loader's own class: another process knows no other, and binds it anew."""
        original = next(base for base in type(self).__bases__ if base is not ResumableLoader)
        plain: Any = object.__new__(original)
        kept = {name: each for name, each in vars(self).items() if not name.startswith("_zero_")}
        vars(plain).update(kept)
        function, arguments, *rest = plain.__reduce_ex__(max(2, protocol))
        # Pickle lets `__newobj__` make nothing but an object of the class of `self`.
        if getattr(function, "__name__", "") == "__newobj__":
            function = object.__new__
        return (function, arguments, *rest)

    def __iter__(self) -> Any:
        trainer = self._zero_trainer()
        if trainer is not None and not trainer.training:
            return super().__iter__()
        position, self._zero_position = self._zero_position, None
        self._zero_counter = None
        in_epoch = position is not None and self._zero_in_epoch
        count = int(position["yielded"]) if position is not None and in_epoch else 0
        if (
            position is not None
            and self.persistent_workers
            and (position["reused"] or not in_epoch)
        ):
            super().__iter__()  # the original used these workers' iterator again: it drew less
        if self._zero_pending is not None:
            self._zero_pending.before_iterator(self, in_epoch=in_epoch)
        if position is not None:
            self._zero_rewind(position, in_epoch)
        if self._zero_twice:
            self._zero_twice = False
            super().__iter__()
        self._zero_reused = self.persistent_workers and self._iterator is not None
        self._zero_start = states(self)
        self._zero_first = {} if position is None or not in_epoch else position["first"]
        self._zero_counter = _CountingIterator(self, self._zero_iterate(count), count)
        if self._zero_pending is not None:
            self._zero_pending.after_iterator()
        return self._zero_counter

    def _zero_rewind(self, position: Mapping[str, Any], in_epoch: bool) -> None:
        """The random streams as when the epoch began, or as when the checkpoint was written."""
        if position["seed"] is not None and hasattr(self.sampler, "seed"):
            self.sampler.seed = position["seed"]  # a DistributedSampler's order comes from it
        if not in_epoch:
            set_own_states(self, position["generators"])
            return
        put_back(self, position["start"])
        if position["epoch"] is not None and hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(position["epoch"])

    def _zero_iterate(self, count: int) -> Iterator[Any]:
        stream = isinstance(self.dataset, IterableDataset) or _has_own_iterator(type(self))
        if stream or not count:
            iterator: Iterator[Any] = super().__iter__()
            put_back(self, self._zero_first)
            for _ in islice(iterator, count):
                pass
            return iterator
        whole = super()._index_sampler
        self._zero_skipper = _SkipFirst(whole, count)
        if self._zero_reused and self._iterator is not None:
            self._iterator._index_sampler = self._zero_skipper
        iterator = super().__iter__()
        put_back(self, self._zero_first)
        self._zero_skipper.skip()
        self._zero_skipper = None
        if self._zero_reused and self._iterator is not None:
            self._iterator._index_sampler = whole
        return iterator

    @property
    def _index_sampler(self) -> Any:
        return super()._index_sampler if self._zero_skipper is None else self._zero_skipper


def can_resume(loader: object) -> bool:
    """Whether `make_resumable` is for this loader: a `DataLoader` that keeps no state itself."""
    if isinstance(loader, ResumableLoader):
        return True
    return isinstance(loader, DataLoader) and not hasattr(loader, "load_state_dict")


def make_resumable(
    loader: DataLoader[Any],
    pending: PendingRng | None = None,
    position: Mapping[str, Any] | None = None,
    *,
    in_epoch: bool = False,
) -> DataLoader[Any]:
    """`loader` itself, of another class; it continues from `position` (see `zero_bind`)."""
    if not isinstance(loader, ResumableLoader):
        loader.__class__ = _resumable_class(type(loader))
    assert isinstance(loader, ResumableLoader)
    loader.zero_bind(pending, position, in_epoch=in_epoch)
    return loader


def make_reloaded(loader: DataLoader[Any], pending: PendingRng, *, twice: bool) -> DataLoader[Any]:
    """`loader` itself, made anew by Lightning for the first epoch of a resumed run (see `zero_bind`)."""
    pending.reload()
    position = loader._zero_given if isinstance(loader, ResumableLoader) else None
    made = make_resumable(loader, pending)
    assert isinstance(made, ResumableLoader)
    made.zero_bind(pending, position, in_epoch=False, twice=twice)
    return made


_classes: dict[type, type] = {}


def _resumable_class(original: type) -> type:
    """A subclass of both; one per class, so that two loaders of a class stay of one class."""
    if original not in _classes:
        body = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        _classes[original] = type(original.__name__, (ResumableLoader, original), body)
    return _classes[original]


def _has_own_iterator(kind: type) -> bool:
    """Whether the user's class replaces `DataLoader.__iter__`: its indices may not be batches."""
    overriding = (base for base in kind.__mro__ if "__iter__" in vars(base))
    return next(base for base in overriding if base is not ResumableLoader) is not DataLoader


def _number(sampler: Any, name: str) -> int | None:
    """An integer of any type that a sampler has under this name."""
    try:
        return operator.index(getattr(sampler, name, None))  # type: ignore[arg-type]
    except TypeError:
        return None
