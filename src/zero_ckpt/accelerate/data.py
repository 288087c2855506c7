"""The place in the data: what a checkpoint holds of Accelerate's loaders, and how they go on from it.

Owns: the state of `accelerator.prepare`d loaders in a checkpoint, and its translation to another
number of processes. Promises: an interrupted epoch continues with exactly the batches that were left
of it, and later epochs have the order that they would have had; nothing changes before the function
that `plan_loaders` returns is called. May not change how Accelerate's loaders are used:

- A stateful loader (`use_stateful_dataloader`) continues by itself when it is iterated next.
- Any other begins the interrupted epoch again, in its order, and `skip_first_batches(loader, n)`
  leaves out what was handed out, as Accelerate documents it. (A loop that passes over the first
  batches by hand gets the right ones too.) Accelerate's own function does as well as the method,
  but for two things: the global random streams may then be a few draws off, and with
  `dispatch_batches` it counts the batches of all processes.
- An epoch that the training left early (`break`) before it saved is over, for an ordinary loader,
  unless `skip_first_batches` asks for the rest of it: what comes next is what would have come next.

At another number of processes or batch size: the order of an epoch does not depend on them, so a
position is counted in samples. Where it falls between two steps of this job, the step before is where
the epoch continues: samples of it are seen twice, none is left out. Loaders whose place only
torchdata knows (streams, data sets and samplers with a state of their own) begin the epoch again.
What is loaded then comes from rank 0's state, and the user is told where the epoch continues.

Streams without a state are read again up to the place. Random streams inside loader workers start
anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, SkipBatchSampler
from accelerate.data_loader import skip_first_batches as accelerate_skip_first_batches

from zero_ckpt.accelerate import data_states
from zero_ckpt.accelerate.data_classes import can_track, is_tracked, track
from zero_ckpt.accelerate.data_tracking import Tracker
from zero_ckpt.accelerate.data_turns import Epoch, Position
from zero_ckpt.core import rng
from zero_ckpt.core.shapes import Shape

__all__ = ["LOADERS", "capture_loaders", "plan_loaders", "skip_first_batches", "track_loaders"]

_VERSION = 1

_ENTRY = {
    "now": data_states.NOW,
    "samples": (int, NoneType),
    "samples_per_step": (int, NoneType),
    "num_workers": int,
    "respawn": bool,
    "stateful": (dict, NoneType),
    "epoch": (int, NoneType),
    "iteration": int,
}
_BEGUN = {
    **_ENTRY,
    "yielded": int,
    "over": bool,
    "abandoned": bool,
    "start": lambda start: None if start is None else data_states.START,
    "fetch": lambda fetch: None if fetch is None else rng.check,
}

LOADERS: Shape = {"version": int, "loaders": [lambda entry: _shape_of(entry)]}
"""What `capture_loaders` returns."""


def _shape_of(entry: Any) -> Shape:
    if entry is None:
        return None
    return _ENTRY if isinstance(entry, dict) and entry.get("epoch") is None else _BEGUN


def track_loaders(accelerator: Any) -> None:
    """Make all prepared loaders remember their place from now on. Does nothing to those that do so already."""
    for loader in accelerator._dataloaders:
        if can_track(loader):
            track(loader)


def capture_loaders(accelerator: Any) -> dict[str, Any]:
    """This rank's state of all prepared loaders: tensors and plain values, and what torchdata gives.

    `{"version": 1, "loaders": [...]}`, an entry for each loader in the order in which they were
    prepared; None for one of a kind that keeps no place (XLA's).
    """
    track_loaders(accelerator)
    entries = [_entry(each) if can_track(each) else None for each in accelerator._dataloaders]
    return {"version": _VERSION, "loaders": entries}


def plan_loaders(
    accelerator: Any, saved: Mapping[str, Any] | None, same_ranks: bool
) -> Callable[[], list[str]]:
    """A function that lets the prepared loaders go on from a checkpoint, and returns notices for the user.

    saved: what `capture_loaders` returned on this rank of the saving job, or, at another world size
    (`same_ranks` False), on its rank 0; None where it kept none. Nothing is changed before the
    function is called.
    """
    if saved is None:
        return list
    loaders, entries = list(accelerator._dataloaders), list(saved["loaders"])

    def install() -> list[str]:
        notices = []
        if len(loaders) != len(entries):
            notices.append(
                f"{len(entries)} data loaders were prepared when the checkpoint was saved, and {len(loaders)} are now: "
                "those in the same places go on from it."
            )
        for place, (loader, entry) in enumerate(zip(loaders, entries, strict=False)):
            if entry is not None and can_track(loader):
                track(loader)
                told = _install(loader, entry, same_ranks)
                notices += [f"Data loader {place}: {sentence}" for sentence in told]
        return notices

    return install


def skip_first_batches(loader: Any, num_batches: int = 0) -> Any:
    """`accelerate.skip_first_batches`, which knows what was loaded: see this module's docstring.

    num_batches: batches of this process to leave out. When it is the number that the checkpoint was
    saved at, by a job with other steps, the same samples are left out. Returns a loader of what is
    left, for one epoch; `loader` then goes on with the next.
    """
    if not is_tracked(loader):
        return accelerate_skip_first_batches(loader, num_batches=num_batches)
    tracker: Tracker = loader._zero_tracker
    position = tracker.pending
    if position is not None and num_batches == position.saved:
        num_batches = position.yielded
    if tracker.stateful and position is not None:
        tracker.continue_stateful(None)  # torchdata would go on from the place as well
    stream = data_states.is_stream(loader)
    width = 1 if stream else data_states.batches_per_step(loader)
    skipping = accelerate_skip_first_batches(loader, num_batches=num_batches * width)
    _keep_settings(loader, skipping)
    track(skipping, loader, (loader._zero_skip or 0) + num_batches)
    return skipping


def _keep_settings(loader: Any, skipping: Any) -> None:
    """Hand on what Accelerate's function forgets."""
    skipping._drop_last, skipping._non_blocking = loader._drop_last, loader._non_blocking
    skipping.iteration = loader.iteration  # Accelerate before 1.15 begins with epoch 0 again
    if isinstance(loader, DataLoaderDispatcher):
        skipping.slice_fn, skipping.submesh_tp = loader.slice_fn, loader.submesh_tp
    sampler = data_states.index_sampler(skipping)
    if isinstance(sampler, SkipBatchSampler):
        # Without these `gather_for_metrics` keeps what was added to even out the last batch.
        for name in ("batch_size", "num_processes", "split_batches"):
            if hasattr(sampler.batch_sampler, name):
                setattr(sampler, name, getattr(sampler.batch_sampler, name))


def _entry(loader: Any) -> dict[str, Any]:
    """One loader's state; what was loaded, if nothing has happened since."""
    tracker: Tracker = loader._zero_tracker
    tracker.settle()
    base = loader.base_dataloader
    common = {
        "now": data_states.capture_now(loader),
        "samples": data_states.sample_count(loader),
        "samples_per_step": data_states.samples_per_step(loader),
        "num_workers": base.num_workers,
        "respawn": tracker.respawn or bool(base.persistent_workers and base._iterator is not None),
        "stateful": dict(loader.dl_state_dict) if tracker.delegated else None,
    }
    if tracker.pending is not None:
        return {**common, **_still(tracker.pending)}
    if tracker.epoch is None:
        return {**common, "epoch": None, "iteration": loader.iteration}
    return {**common, **_so_far(tracker, tracker.epoch, loader.iteration)}


def _still(position: Position) -> dict[str, Any]:
    """The state of a loader that is still at the place that was loaded."""
    return {
        "epoch": position.number,
        "iteration": position.number + 1 if position.over else position.number,
        "yielded": position.yielded,
        "over": position.over,
        "abandoned": position.abandoned,
        "start": position.start,
        "fetch": position.fetch,
        "stateful": position.stateful,
    }


def _so_far(tracker: Tracker, epoch: Epoch, iteration: int) -> dict[str, Any]:
    over = epoch.over or tracker.has_handed_out_all
    return {
        "epoch": epoch.number,
        "iteration": iteration + 1 if over and iteration == epoch.number else iteration,
        "yielded": epoch.yielded,
        "over": over,
        "abandoned": not over and not epoch.running,
        "start": None if over else epoch.start,
        "fetch": None if over or epoch.fetch is None else epoch.fetch.packed(),
    }


def _install(loader: Any, entry: Mapping[str, Any], same_ranks: bool) -> list[str]:
    tracker: Tracker = loader._zero_tracker
    loader.iteration = int(entry["iteration"])
    data_states.restore_now(loader, entry["now"])
    tracker.forget()
    tracker.respawn = bool(entry["respawn"])
    told = []
    if (samples := data_states.sample_count(loader)) != entry["samples"]:
        told.append(
            f"an epoch has {samples} samples, and had {entry['samples']} when the checkpoint was saved, so the order "
            "of the data is another."
        )
    if entry["epoch"] is not None:
        alike = same_ranks and _same_steps(loader, entry)
        tracker.pending = _position(tracker, entry, alike)
        if tracker.stateful:
            tracker.continue_stateful(tracker.pending)
        if not alike and not tracker.pending.over:
            told.append(_translation(tracker, entry))
    return told


def _same_steps(loader: Any, entry: Mapping[str, Any]) -> bool:
    same = bool(data_states.samples_per_step(loader) == entry["samples_per_step"])
    if loader._zero_tracker.delegated:  # torchdata's state is one of its workers
        return same and bool(loader.base_dataloader.num_workers == entry["num_workers"])
    return same


def _position(tracker: Tracker, entry: Mapping[str, Any], alike: bool) -> Position:
    yielded = int(entry["yielded"])
    if not alike:
        yielded = 0 if tracker.delegated else _translated(tracker, entry)[0]
    return Position(
        number=int(entry["epoch"]),
        saved=int(entry["yielded"]),
        yielded=yielded,
        over=bool(entry["over"]),
        abandoned=bool(entry["abandoned"]),
        start=entry["start"],
        fetch=entry["fetch"] if alike else None,
        stateful=entry["stateful"] if alike else None,
    )


def _translated(tracker: Tracker, entry: Mapping[str, Any]) -> tuple[int, int]:
    """(steps of this job that hold the samples handed out by the saving job, samples that are left over)."""
    before, now = entry["samples_per_step"], data_states.samples_per_step(tracker.loader)
    if before is None or now is None:
        return int(entry["yielded"]), 0
    return divmod(int(entry["yielded"]) * int(before), now)


def _translation(tracker: Tracker, entry: Mapping[str, Any]) -> str:
    place = f"the checkpoint was saved after {entry['yielded']} batches of epoch {entry['epoch']}"
    if tracker.delegated:
        return (
            f"{place}. Only torchdata knows its place, for the same processes and workers, and they differ: the epoch "
            "begins again."
        )
    if None in (entry["samples_per_step"], data_states.samples_per_step(tracker.loader)):
        return f"{place} by other processes; its batches have no fixed size, so they are counted as this job's."
    steps, left = _translated(tracker, entry)
    again = f" ({left} samples before that come again)" if left else ""
    asked = (
        ""
        if tracker.stateful
        else f"; ask for the rest by skip_first_batches(loader, {entry['yielded']})"
    )
    return (
        f"{place}, by other processes or with another batch size. The same samples are {steps} batches of this job, "
        f"where the epoch continues{again}{asked}."
    )
