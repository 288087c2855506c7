"""What each rank keeps for itself in a checkpoint: generators, its place in the data, gradients of an open window.

Within an epoch, a rank's place is how many batches its loaders have handed out and how the
generators stood when the epoch began (`data.py`). It is stored per rank, and restored exactly at
the same world size; at another one it is derived, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from zero_ckpt.core import rng
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.naming import parameter_names
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.shapes import Shape
from zero_ckpt.lightning import epochs
from zero_ckpt.lightning.data import LOADER, can_resume, make_resumable
from zero_ckpt.lightning.pending_rng import PendingRng
from zero_ckpt.lightning.windows import Windows
from zero_ckpt.zero.accumulated import gradients_fit, put_gradients

__all__ = ["PARTS", "Resumption", "capture_rank", "restore_rank"]

PARTS: dict[str, Shape] = {
    "rng": rng.check,
    "in_epoch": bool,
    "window": int,
    "gradients": {str: torch.Tensor},
    "loaders": [lambda state: LOADER if _is_ours(state) else dict],
}
"""What `capture_rank` returns, part by part. A stateful loader of the user's may store anything."""


def capture_rank(
    trainer: Any, checkpoint: dict[str, Any], device: torch.device, windows: Windows
) -> dict[str, Any]:
    """This rank's own state; none without a trainer. Takes the loaders' states out of Lightning's `checkpoint`.

    (Lightning keeps those of rank 0 only, and would refuse ours where loaders are ordinary ones.)
    """
    if trainer is None:  # the module was connected to the strategy by hand
        return {}
    loaders = _take_loaders(checkpoint)
    fetched_ahead = len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))
    for state in loaders:
        if "zero_ckpt_loader" in state:
            state["yielded"] -= fetched_ahead
    return {
        "rng": _rng_after_validation(trainer, device),
        "in_epoch": epochs.is_within(trainer),
        "window": trainer.accumulate_grad_batches,
        "gradients": windows.gradients(trainer),
        "loaders": loaders,
    }


def _rng_after_validation(trainer: Any, device: torch.device) -> dict[str, Any]:
    """The generators as training will find them next.

    A validation that is due after this batch is not made up for when the run is resumed, but its
    loaders' iterators draw a seed each. (What a validation step itself draws is not known.)
    """
    state = rng.capture(device)
    epoch_loop = trainer.fit_loop.epoch_loop
    progress = epoch_loop.batch_progress.current
    if not trainer.training or progress.processed == progress.completed:
        return state  # not in `on_train_batch_end`
    if epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        generator = torch.Generator()
        generator.set_state(state["torch"])
        for loader in _flat(trainer.val_dataloaders):
            if isinstance(loader, DataLoader) and loader.generator is None:
                torch.empty((), dtype=torch.int64).random_(generator=generator)
        state["torch"] = generator.get_state()
    return state


def _flat(loaders: Any) -> list[Any]:
    if isinstance(loaders, dict):
        return [each for value in loaders.values() for each in _flat(value)]
    if isinstance(loaders, (list, tuple)):
        return [each for value in loaders for each in _flat(value)]
    return [] if loaders is None else [loaders]


def _is_ours(state: Any) -> bool:
    """Whether a loader's state is one of ours (`data.py`)."""
    return isinstance(state, dict) and "zero_ckpt_loader" in state


def _take_loaders(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all loaders that have one. Lightning's list of them is left in place only if no loader is ours."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    state = fit_loop.get("state_dict", {})
    loaders: list[dict[str, Any]] = state.get("combined_loader", [])
    if any("zero_ckpt_loader" in each for each in loaders):
        del state["combined_loader"]
    return loaders


@dataclass(slots=True)
class Resumption:
    """Where this rank's training continues.

    positions: of its loaders, in their order.
    place: batches of the epoch that the loop has behind it; None: as Lightning has it.
    scaled: whether the place was that of another number of ranks.
    gradients: what this rank had accumulated, of a window that is not complete.
    """

    pending: PendingRng
    in_epoch: bool
    positions: list[Mapping[str, Any]] = field(default_factory=list)
    place: int | None = None
    scaled: bool = False
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def bind(self, trainer: Any, loader: object) -> object:
        """Let `loader`, the run's next training loader, continue where it was; returns it."""
        if isinstance(loader, DataLoader) and can_resume(loader):
            position = self.positions.pop(0) if self.positions else None
            if position is not None and "zero_ckpt_loader" not in position:
                position = None  # it had another kind of loader's place
            if position is not None and self.scaled and self.in_epoch:
                position = self._within(trainer, loader, position)
            return make_resumable(loader, self.pending, position, in_epoch=self.in_epoch)
        if hasattr(loader, "load_state_dict") and self.positions:
            self.positions.pop(0)  # Lightning gives it its state
        return loader

    def _within(
        self, trainer: Any, loader: DataLoader[Any], position: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """`position`, before the end of the epoch as this run has it (it may be limited, or drop a batch)."""
        batches = _batches(loader, trainer.limit_train_batches)
        if self.place is None or batches is None or position["yielded"] < self.place:
            return position  # a shorter loader, which begins again within the epoch
        self.place = epochs.within(self.place, batches, trainer.accumulate_grad_batches)
        return {**position, "yielded": self.place}

    def settle(self, fit_loop: Any) -> None:
        """Loaders are bound, and the loop is about to run: let it count from where they are."""
        progress = fit_loop.epoch_loop.batch_progress
        if self.in_epoch:
            if self.place is not None:
                epochs.settle(fit_loop.epoch_loop, self.place, within_epoch=True)
        elif self.scaled and progress.is_last_batch and fit_loop.max_batches != float("inf"):
            epochs.settle(fit_loop.epoch_loop, fit_loop.max_batches, within_epoch=False)

    def reopen_window(self, module: nn.Module) -> str:
        """Give `module` the gradients of its window back. Returns a notice for the user, or ""."""
        if not self.gradients:
            return ""
        names = parameter_names(module)
        if not gradients_fit([module], names, self.gradients):
            return (
                "the checkpoint was saved within a gradient accumulation window, whose gradients have no place in a "
                "model that is sharded in another way: the step of that window is made of the batches that are left "
                "of it"
            )
        put_gradients([module], names, self.gradients)
        return ""


def _batches(loader: DataLoader[Any], limit: float) -> int | None:
    """Batches of an epoch under `limit_train_batches`; None where the loader does not know."""
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        return None
    return min(length, limit) if isinstance(limit, int) else int(length * limit)


def restore_rank(
    checkpoint: Checkpoint,
    state: dict[str, Any],
    lightning_state: dict[str, Any],
    rank: int,
    world_size: int,
    device: torch.device,
    window: int,
) -> Resumption | None:
    """What `rank` of `world_size` continues with; None when the checkpoint has no such state.

    state: what a rank of the saving job stored for itself: this one's own at the same world size.
    window: batches for which gradients are accumulated now.

    May change `lightning_state`, so that users' own stateful loaders get this rank's states.
    """
    saved = checkpoint.manifest.world_size
    if "rng" not in state:
        return None
    loaders = state.get("loaders", [])
    in_epoch = bool(state.get("in_epoch", False))
    place, gradients = None, {}
    if saved == world_size:
        gradients = state.get("gradients", {})
        _give_loaders(lightning_state, loaders)
        if in_epoch:
            place, loaders = _placed(lightning_state, loaders, lambda done: done)
    else:
        _warn_derived(checkpoint, rank, world_size)
        if in_epoch:
            windows = {"window": window, "saved_window": state.get("window", window)}
            scale = partial(epochs.scaled, saved=saved, world_size=world_size, **windows)
            place, loaders = _placed(lightning_state, loaders, scale)
        state["rng"] = _derived(state["rng"], rank, device)
    pending = PendingRng(state["rng"], device)
    return Resumption(pending, in_epoch, list(loaders), place, saved != world_size, gradients)


def _give_loaders(lightning_state: dict[str, Any], loaders: list[dict[str, Any]]) -> None:
    """Give users' stateful loaders this rank's states, not rank 0's."""
    fit_loop = lightning_state.get("loops", {}).get("fit_loop", {})
    if any("zero_ckpt_loader" not in each for each in loaders):
        fit_loop.setdefault("state_dict", {})["combined_loader"] = loaders


def _warn_derived(checkpoint: Checkpoint, rank: int, world_size: int) -> None:
    text = (
        f"{checkpoint.path} was saved by {rng.count_ranks(checkpoint.manifest.world_size)} and is resumed "
        f"by {world_size}: random number generators are derived from the saved ones, and the "
        "place in the epoch is scaled, so the run is not bitwise the uninterrupted one."
    )
    warn_on_first(rank, [text])


def _derived(state: Mapping[str, Any], rank: int, device: torch.device) -> dict[str, Any]:
    """The state that `rng.derive` would put this rank's generators into; they stay as they are."""
    now = rng.capture(device)
    try:
        rng.derive(state, rank, device)
        return rng.capture(device)
    finally:
        rng.restore(now, device)


def _placed(
    lightning_state: Mapping[str, Any],
    loaders: list[dict[str, Any]],
    scale: Callable[[int], int],
) -> tuple[int | None, list[dict[str, Any]]]:
    """(the loop's place, the loaders' states at it), both by `scale`; None for a place that loaders keep themselves."""
    if not loaders or any("zero_ckpt_loader" not in each for each in loaders):
        return None, loaders
    fit_loop = lightning_state.get("loops", {}).get("fit_loop", {})
    counters = fit_loop.get("epoch_loop.batch_progress", {}).get("current", {})
    place = scale(epochs.batches_trained(counters))
    given = epochs.batches_given(counters)
    along = [each["yielded"] == given for each in loaders]
    return place if any(along) else None, [
        {**each, "yielded": place if follows else scale(each["yielded"])}
        for each, follows in zip(loaders, along, strict=True)
    ]
