"""The place in an epoch at which both the loop and the loaders go on.

Lightning counts what a rank was given (`ready`), has trained on (`processed`), and has run all hooks for (`completed`).
A save may come in between. What counts here is what was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "batches_given",
    "batches_trained",
    "begin_next",
    "is_in_window",
    "is_within",
    "keep_reloads",
    "scaled",
    "settle",
    "within",
]


def batches_given(counters: Mapping[str, int]) -> int:
    """Batches that the loop has taken in this epoch."""
    return int(counters.get("ready", 0))


def batches_trained(counters: Mapping[str, int]) -> int:
    """Batches of this epoch that the model has learned from."""
    return int(counters.get("processed", 0))


def scaled(
    done: int, saved: int, world_size: int, *, window: int = 1, saved_window: int = 1
) -> int:
    """The place after `done` batches of each of `saved` ranks, in batches of `world_size` ranks.

    Always where a window of `window` batches (gradient accumulation) begins: gradients that wait in a window have no
    place on other ranks. So nothing is skipped, and less than one window of either job is repeated.

    saved_window: the window of the job that saved.
    """
    stepped = done // saved_window * saved_window
    return stepped * saved // world_size // window * window


def within(place: int, batches: int, window: int) -> int:
    """`place`, or the beginning of the last window of an epoch of `batches`, if that is earlier."""
    return max(0, min(place, (batches - 1) // window * window))


def is_within(trainer: Any) -> bool:
    """Whether the loop has begun an epoch, has batches of it left to train on, and has not ended it before them."""
    epoch = trainer.fit_loop.epoch_progress.current
    progress = trainer.fit_loop.epoch_loop.batch_progress
    given, done = progress.current.ready, progress.current.processed
    over = (progress.is_last_batch and given == done) or epoch.processed == epoch.ready
    return bool(given > 0 and done < trainer.num_training_batches and not over)


def is_in_window(trainer: Any) -> bool:
    """Under automatic optimization: whether gradients of whole batches wait for the rest of their window."""
    loop = trainer.fit_loop.epoch_loop
    current = loop.batch_progress.current
    return bool(
        is_within(trainer) and current.ready == current.processed and loop._should_accumulate()
    )


def settle(epoch_loop: Any, place: int, *, within_epoch: bool) -> None:
    """Let the loop go on after `place` batches. Call it in the strategy's `on_train_start`.

    Lightning adds one to `completed` there when the save came from `on_train_batch_end`.
    """
    progress = epoch_loop.batch_progress
    current = progress.current
    current.ready = current.started = current.processed = place
    current.completed = place - epoch_loop.restarted_on_train_batch_end
    progress.is_last_batch = not within_epoch


def begin_next(fit_loop: Any) -> None:
    """Let the loop begin its next epoch like any other, where the save came after the last batch of one.

    Lightning closes that epoch when it resumes, and then takes the next for the rest of it: no `on_train_epoch_start`,
    and counters of epochs by which a later save in that epoch would seem to lie after its end. Call it in the
    strategy's `on_train_start`.
    """
    epoch = fit_loop.epoch_progress.current
    if fit_loop.restarted_mid_epoch and epoch.processed == epoch.ready:
        fit_loop.reset_restart_stage()


def keep_reloads(fit_loop: Any, every: int) -> None:
    """Let loaders be made anew when an uninterrupted run does it: in the first epoch and in each `every`-th after it.

    every: `reload_dataloaders_every_n_epochs`; 0: never.

    Lightning counts from the epoch in which it resumes. Call it in the strategy's `on_train_start`.
    """
    epoch = fit_loop.epoch_progress.current
    begun = epoch.processed if fit_loop.restarted_on_epoch_start else epoch.ready - 1
    if every:
        fit_loop._last_train_dl_reload_epoch = max(0, begun) // every * every
