"""What a load does to an accelerator: the reads to make, what to install after them, and what to tell the user.

Nothing here changes anything before the plan that it makes is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from zero_ckpt.accelerate import data
from zero_ckpt.accelerate.base import ZeroBase
from zero_ckpt.accelerate.buffers import restore_buffers
from zero_ckpt.accelerate.content import ENTRY, RANK_PARTS
from zero_ckpt.accelerate.gradients import gradients_fit, restore_gradients
from zero_ckpt.accelerate.registered import as_live
from zero_ckpt.core import rng
from zero_ckpt.core.binding import bound_names
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.load_plan import Wanted, plan_training, plan_weights
from zero_ckpt.core.naming import dotted
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.outcome import LoadResult, report_of
from zero_ckpt.core.per_rank import client_state_notice, own_client_state, read_own
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.errors import StateMismatchError

__all__ = ["PlanMixin", "wanted_of"]


def wanted_of(load_kwargs: Mapping[str, Any] | None, kwargs: Mapping[str, Any]) -> Wanted:
    """What a call of `load_state` asks for.

    Raises TypeError for arguments that nothing here knows, and Accelerate's for a `map_location`.
    """
    given = dict(kwargs)
    if given.pop("map_location", None) not in (None, "cpu", "on_device"):
        raise TypeError(
            "Unsupported optimizer map location passed, please choose one of `None`, `'cpu'`, or `'on_device'`"
        )
    if "strict" in given:  # what Accelerate calls it
        given["load_module_strict"] = given.pop("strict")
    known = inspect.signature(Wanted).parameters
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"load_state() got unexpected keyword arguments: {', '.join(unknown)}")
    given.setdefault("weights_only", (load_kwargs or {}).get("weights_only", True))
    return Wanted(**given)


class PlanMixin(ZeroBase):
    """The parts of a load that know what a checkpoint holds. Nothing here overrides Accelerate."""

    def _zero_plan(
        self,
        checkpoint: Checkpoint,
        objects: dict[str, Any],
        models: dict[str, nn.Module],
        wanted: Wanted,
    ) -> tuple[Restoration, LoadResult]:
        """(what to read, install and tell; what the load will return)."""
        control = self.zero_control
        if not self._models and any(True for _ in checkpoint.keys("model")):
            raise StateMismatchError(
                f"{checkpoint.path} holds weights, and this accelerator has prepared no model. Nothing was loaded. "
                "Call load_state after prepare()."
            )
        skipped = [dotted(name) for name in self.zero_models() if name not in models]

        def is_skipped(key: str) -> bool:
            return any(key.startswith(prefix) for prefix in skipped)

        plan = plan_weights(checkpoint, models, objects, wanted, control, ignored=is_skipped)
        report = report_of(plan)
        plan.add(
            plan_training(
                checkpoint,
                bound_names(self.zero_models()),
                self.zero_optimizers(),
                self.zero_schedulers(),
                objects,
                wanted,
                control.rank,
            )
        )
        parts = {} if wanted.load_module_only else RANK_PARTS
        own = read_own(checkpoint, control, wanted.weights_only, parts)
        notice = client_state_notice(checkpoint, control.world_size, own)
        plan.notices += [notice] if notice else []
        if not wanted.load_module_only:
            plan.installs.append(self._zero_install(checkpoint, objects, models, own, plan.notices))
        mine = own_client_state(checkpoint, control, own)
        return plan, LoadResult(checkpoint.path, objects.get("client_state"), mine, report)

    def _zero_install(
        self,
        checkpoint: Checkpoint,
        objects: dict[str, Any],
        models: dict[str, nn.Module],
        own: Mapping[str, Any],
        notices: list[str],
    ) -> Callable[[], None]:
        """A function that restores counters, registered objects, the scaler, gradients, loaders and generators.

        Generators come last, since what comes before may draw numbers. `objects`: what rank 0 stored for all. `own`:
        what this rank stored for itself, or rank 0 at another world size. `notices`: what the user is told, which the
        function adds to.
        """
        control, saved = self.zero_control, objects.get(ENTRY, {})
        same_ranks = checkpoint.manifest.world_size == control.world_size
        gradients, step = self._zero_window(checkpoint.path, saved, own, same_ranks, notices)
        buffers_differ = same_ranks and not self.zero_shares_buffers
        buffers = own.get("buffers", {}) if buffers_differ else {}
        loaders = data.plan_loaders(self, own.get("dataloaders"), same_ranks)
        custom = [
            (each, as_live(state, each.state_dict()))
            for each, state in zip(self._custom_objects, saved.get("custom", ()), strict=False)
        ]

        def install() -> None:
            self._zero_step = checkpoint.manifest.step
            self.step = step
            for each, state in custom:
                each.load_state_dict(state)
            if self.scaler is not None and saved.get("scaler"):
                self.scaler.load_state_dict(saved["scaler"])
            restore_gradients(self, gradients)
            restore_buffers(models, buffers)
            notices.extend(loaders())
            rng.plan_restore(own.get("rng"), same_ranks, control.rank, self.zero_device())()

        return install

    def _zero_window(
        self,
        path: str,
        saved: Mapping[str, Any],
        own: Mapping[str, Any],
        same_ranks: bool,
        notices: list[str],
    ) -> tuple[dict[str, Any], int]:
        """This rank's gradients of an incomplete accumulation window, and Accelerate's counter of batches.

        Where they have no place, none, and the counter at the window's beginning, with a notice. `saved`: the object
        that only Accelerate has.
        """
        gradients, step = own.get("gradients", {}), int(saved.get("step", 0))
        if gradients and not (same_ranks and gradients_fit(self, gradients)):
            window = max(1, saved.get("gradient_accumulation_steps", 1))
            notices.append(
                f"{path} was saved within a gradient accumulation window, whose gradients have no place at another "
                "world size or in a model that is sharded in another way: the window begins anew"
            )
            return {}, step - step % window
        return gradients, step

    def _zero_check_custom(self, path: str, objects: dict[str, Any], wanted: Wanted) -> None:
        """Raises Accelerate's RuntimeError for another number of registered objects."""
        if wanted.load_module_only or ENTRY not in objects:
            return
        found, registered = len(objects[ENTRY]["custom"]), len(self._custom_objects)
        if found != registered:
            raise RuntimeError(
                f"Number of custom checkpoints in folder {path} does not match the number of registered objects:"
                f"\n\tFound checkpoints: {found}\n\tRegistered objects: {registered}\n"
                "Please make sure to only load checkpoints from folders that were created with the same set of "
                "registered objects. Nothing was loaded."
            )

    def _zero_tell_differences(self, checkpoint: Checkpoint, objects: dict[str, Any]) -> None:
        saved = objects.get(ENTRY)
        if saved is None and self._custom_objects:
            self._zero_warn(
                f"{checkpoint.path} was not written by an accelerator: objects that are registered for checkpointing "
                "keep their state"
            )
        world_size = self.zero_control.world_size
        notice = rng.world_size_notice(checkpoint, world_size)
        if notice:
            self._zero_warn(notice)
        if saved and saved["num_processes"] != world_size and self._zero_steps_by_size():
            steps = "1 step" if world_size == 1 else f"{world_size} steps"
            self._zero_warn(
                f"AcceleratedScheduler makes {steps} for each optimizer step, and made "
                f"{saved['num_processes']} when {checkpoint.path} was saved: the learning rate changes faster or "
                "slower than before. split_batches=True in the DataLoaderConfiguration makes it independent of that."
            )

    def _zero_steps_by_size(self) -> bool:
        """Whether any scheduler's steps depend on the number of processes."""
        return any(s.step_with_optimizer and not s.split_batches for s in self._schedulers)

    def _zero_warn(self, text: str) -> None:
        warn_on_first(self.zero_control.rank, [text])
