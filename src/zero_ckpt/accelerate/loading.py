"""`load_state`: from a checkpoint of ours into what the accelerator has prepared, all or nothing on every rank.

A folder that Accelerate wrote goes to Accelerate's own code.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.accelerate.base import ZeroBase
from zero_ckpt.accelerate.content import ENTRY, names_for
from zero_ckpt.accelerate.gradients import restore_gradients
from zero_ckpt.accelerate.hooks import run_load_hooks
from zero_ckpt.accelerate.meeting import together
from zero_ckpt.accelerate.naming import OURS, candidates, kind_of, next_iteration
from zero_ckpt.accelerate.saving import SaveMixin
from zero_ckpt.core import rng
from zero_ckpt.core.binding import bound_names, check_same_names, prefix_of, set_extra_state
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.loading import load_together
from zero_ckpt.core.restoring import Restoration, plan_model, plan_optimizer
from zero_ckpt.core.state import ModelState, capture_models
from zero_ckpt.core.tags import is_tag_folder
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
)

__all__ = ["LoadMixin"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a call of `load_state` asks for."""

    strict: bool = True
    weights_only: bool = True
    optimizers: bool = True
    schedulers: bool = True
    module_only: bool = False

    @classmethod
    def of(cls, load_kwargs: Mapping[str, Any] | None, kwargs: Mapping[str, Any]) -> Wanted:
        """Raises TypeError for arguments that nothing here knows, and Accelerate's for a `map_location`."""
        given = dict(kwargs)
        if given.pop("map_location", None) not in (None, "cpu", "on_device"):
            raise TypeError(
                "Unsupported optimizer map location passed, please choose one of `None`, `'cpu'`, or `'on_device'`"
            )
        module_only = bool(given.pop("load_module_only", False))
        strict = bool(given.pop("strict", given.pop("load_module_strict", True)))
        given.pop("load_module_strict", None)
        optimizers = bool(given.pop("load_optimizer_states", True)) and not module_only
        schedulers = bool(given.pop("load_lr_scheduler_states", True)) and not module_only
        if given:
            raise TypeError(f"load_state() got unexpected keyword arguments: {', '.join(given)}")
        weights_only = bool((load_kwargs or {}).get("weights_only", True))
        return cls(strict, weights_only, optimizers, schedulers, module_only)


class LoadMixin(SaveMixin):
    """Overrides of the accelerator that load."""

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        *,
        tag: str | int | None = None,
        **load_model_func_kwargs: Any,
    ) -> Any:
        """Collective: load into everything that is prepared and registered. Returns the client state.

        `input_dir`: a checkpoint directory, or a tag's folder itself, whoever wrote it (an accelerator, the Lightning
        strategy, a `Checkpointer`); None under `automatic_checkpoint_naming`: the newest one. `tag` None: what `latest`
        names, or, when that is missing or damaged, the newest checkpoint that verifies, with a warning. Any world size,
        stage and mesh loads any other. All or nothing: on an error nothing has changed on any rank.

        `load_kwargs={"weights_only": False}` allows pickled objects, whose opening can run code. Of
        `load_model_func_kwargs`: `strict`, `map_location` (checked as Accelerate does; state always lands where it
        lives), and `load_module_only`, `load_optimizer_states`, `load_lr_scheduler_states` as in `Checkpointer`.

        Raises Accelerate's own errors for what it documents (ValueError for a folder that is not there, RuntimeError
        for another number of registered objects), and those of `zero_ckpt.errors` for the rest. For a folder that
        Accelerate wrote its own code takes over, and the result is None.
        """
        if not self.zero_is_ours:
            self._zero_pass_on("load_state", tag)
            return super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)
        where = self._zero_find(input_dir, tag)
        for index, (directory, is_ours) in enumerate(where["candidates"]):
            try:
                if is_ours:
                    wanted = Wanted.of(load_kwargs, load_model_func_kwargs)
                    client_state = self._zero_load(directory, tag, wanted)
                else:
                    client_state = None
                    self._zero_load_foreign(directory, load_kwargs, load_model_func_kwargs)
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                if index + 1 == len(where["candidates"]):
                    raise
                self._zero_warn(f"falling back to an older checkpoint, because {error}")
                continue
            break
        if where["next"] is not None:
            here = self.project_configuration.iteration
            self.project_configuration.iteration = max(here, where["next"])
        self._zero_runtime.ended = False
        return client_state

    def _zero_find(self, input_dir: Any, tag: Any) -> dict[str, Any]:
        """Rank 0's answer: (folder, whether it is ours) of what to try in turn, and the next save's number."""

        def ask() -> str | None:
            if input_dir is not None:
                directory = os.path.expanduser(os.fspath(input_dir))
                if not os.path.isdir(directory):
                    raise ValueError(f"Tried to find {directory} but folder does not exist")
                return str(directory)
            if not self.project_configuration.automatic_checkpoint_naming:
                raise ValueError(
                    "No input_dir provided and automatic checkpoint naming is disabled."
                )
            return None

        checkpoints = os.path.join(self.project_dir or "", "checkpoints")
        naming = self.project_configuration.automatic_checkpoint_naming

        def decide(asked: list[Any]) -> dict[str, Any]:
            paths = list(candidates(checkpoints)) if asked[0] is None else [asked[0]]
            return {
                "candidates": [[p, tag is not None or kind_of(p) == OURS] for p in paths],
                "next": next_iteration(checkpoints) if naming else None,
            }

        found: dict[str, Any] = together(
            self.zero_control, "load: folder", ask, decide, self._zero_options.timeout
        )
        if input_dir is not None:  # each rank its own: a difference is then found out
            found["candidates"][0][0] = os.path.expanduser(os.fspath(input_dir))
        return found

    def _zero_load(self, directory: str, tag: Any, wanted: Wanted) -> Any:
        models = self._zero_run_load_hooks(directory)
        control = self.zero_control
        failures: list[RuntimeError] = []

        def prepare(checkpoint: Checkpoint) -> tuple[Restoration, dict[str, Any]]:
            objects = checkpoint.objects(wanted.weights_only)
            try:
                self._zero_check_custom(checkpoint.path, objects, wanted)
            except RuntimeError as error:
                failures.append(error)
                raise
            return self._zero_plan(checkpoint, objects, models, wanted), objects

        try:
            loaded = load_together(
                self.zero_engine.storage,
                control,
                directory,
                None if tag is None else str(tag),
                prepare,
                timeout=self._zero_options.timeout,
            )
        except Exception:
            if failures:
                raise failures[0] from None
            raise
        with loaded.checkpoint as checkpoint:
            if not wanted.module_only:
                self._zero_tell_differences(checkpoint, loaded.prepared)
            return loaded.prepared.get("client_state")

    def _zero_run_load_hooks(self, directory: str) -> dict[str, nn.Module]:
        """Models to load, by name. Hooks see the checkpoint directory, where save hooks wrote."""
        is_tag = is_tag_folder(self.zero_engine.storage, directory)
        shown = os.path.dirname(os.path.realpath(directory)) if is_tag else directory
        left: list[dict[str, nn.Module]] = []

        def run() -> None:
            left.append(run_load_hooks(self, shown))

        together(self.zero_control, "load: hooks", run, lambda _: None, self._zero_options.timeout)
        return left[0]

    def _zero_plan(
        self,
        checkpoint: Checkpoint,
        objects: dict[str, Any],
        models: dict[str, nn.Module],
        wanted: Wanted,
    ) -> Restoration:
        rank = self.zero_control.rank
        skipped = [f"{name}." if name else "" for name in self.zero_models() if name not in models]

        def is_skipped(key: str) -> bool:
            return any(key.startswith(prefix) for prefix in skipped)

        state = capture_models(models)
        plan = plan_model(checkpoint, state, rank, strict=wanted.strict, ignored=is_skipped)
        extra = objects.get("extra_state", {})
        plan.installs.append(lambda: set_extra_state(models, extra))
        if wanted.optimizers:
            self._zero_plan_optimizers(plan, checkpoint, objects, wanted.weights_only)
        if wanted.schedulers:
            plan.installs.append(self._zero_scheduler_install(checkpoint, objects))
        if not wanted.module_only:
            plan.installs += self._zero_own_installs(checkpoint, objects, state, wanted)
        return plan

    def _zero_plan_optimizers(
        self,
        plan: Restoration,
        checkpoint: Checkpoint,
        objects: dict[str, Any],
        weights_only: bool,
    ) -> None:
        names, records = bound_names(self.zero_models()), objects.get("optimizers", {})
        optimizers = self.zero_optimizers()
        check_same_names(checkpoint.path, "optimizers", optimizers, records)
        for name, optimizer in optimizers.items():
            record = records[name]
            plan.add(
                plan_optimizer(
                    checkpoint,
                    optimizer,
                    names_for(optimizer, record, names),
                    record,
                    self.zero_control.rank,
                    prefix_of(name),
                    weights_only=weights_only,
                )
            )

    def _zero_scheduler_install(
        self, checkpoint: Checkpoint, objects: dict[str, Any]
    ) -> Callable[[], None]:
        saved, live = objects.get("lr_schedulers", {}), self.zero_schedulers()
        check_same_names(checkpoint.path, "schedulers", live, saved)

        def install() -> None:
            for name, scheduler in live.items():
                scheduler.load_state_dict(saved[name])

        return install

    def _zero_own_installs(
        self, checkpoint: Checkpoint, objects: dict[str, Any], state: ModelState, wanted: Wanted
    ) -> list[Callable[[], None]]:
        """Counters, registered objects, the scaler, the window's gradients, and random generators, in this order."""
        control = self.zero_control
        own = objects.get(ENTRY, {})
        same = checkpoint.manifest.world_size == control.world_size
        ranks = checkpoint.rank_objects(control.rank if same else 0, wanted.weights_only)
        gradients = ranks.get("gradients", {}) if same else {}
        apart = same and self.distributed_type == DistributedType.FSDP
        buffers = ranks.get("buffers", {}) if apart else {}
        step = _window_start(own) if ranks.get("gradients") and not same else own.get("step", 0)

        def install() -> None:
            self._zero_step = checkpoint.manifest.step
            self.step = step
            if ENTRY in objects:
                for registered, saved in zip(self._custom_objects, own["custom"], strict=True):
                    registered.load_state_dict(saved)
            if self.scaler is not None and own.get("scaler"):
                self.scaler.load_state_dict(own["scaler"])
            restore_gradients(self, gradients)
            for key in buffers.keys() & state.tensors.keys():
                state.tensors[key].detach().copy_(buffers[key])

        random = rng.plan_restore(checkpoint, control.rank, control.world_size, self.zero_device())
        return [install, random]

    def _zero_check_custom(self, path: str, objects: dict[str, Any], wanted: Wanted) -> None:
        """Raises Accelerate's RuntimeError for another number of registered objects."""
        if wanted.module_only or ENTRY not in objects:
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
        own = objects.get(ENTRY)
        if own is None and self._custom_objects:
            self._zero_warn(
                f"{checkpoint.path} was not written by an accelerator: objects that are registered for checkpointing "
                "keep their state"
            )
        world_size = self.zero_control.world_size
        notice = rng.world_size_notice(checkpoint, world_size)
        if notice:
            self._zero_warn(notice)
        if own is not None and own["num_processes"] != world_size and self._zero_steps_by_size():
            self._zero_warn(
                f"AcceleratedScheduler makes {world_size} steps for each optimizer step, and made "
                f"{own['num_processes']} when {checkpoint.path} was saved: the learning rate changes faster or slower "
                "than before. Prepare schedulers with split_batches=True, or step them yourself, to avoid that."
            )
        if notice and checkpoint.rank_objects(0).get("gradients"):
            self._zero_warn(
                f"{checkpoint.path} was saved within a gradient accumulation window, whose gradients have no place at "
                "another world size: the window begins anew"
            )

    def _zero_steps_by_size(self) -> bool:
        """Whether any scheduler's steps depend on the number of processes."""
        return any(s.step_with_optimizer and not s.split_batches for s in self._schedulers)

    def _zero_warn(self, text: str) -> None:
        if self.zero_control.rank == 0:
            warnings.warn(text, stacklevel=4)

    def _zero_load_foreign(
        self, directory: str, load_kwargs: dict[str, Any] | None, kwargs: dict[str, Any]
    ) -> None:
        """A folder that Accelerate wrote, by its own code; steps are then known from the optimizer's state."""
        sharded = any(isinstance(p, DTensor) for m in self._models for p in m.parameters())
        if sharded and not self.is_fsdp2:
            raise ConfigurationError(
                f"{directory} holds no checkpoint of zero_ckpt, and what Accelerate itself wrote cannot be loaded into "
                f"a model that is sharded at stage {self.zero_stage}. Load it with stage=1 or less, save it, and "
                "load that at any stage."
            )
        super().load_state(directory, load_kwargs, **kwargs)
        self._zero_step = _steps_made(self) or self._zero_step


def _window_start(own: Mapping[str, Any]) -> int:
    step, window = own.get("step", 0), max(1, own.get("gradient_accumulation_steps", 1))
    return int(step - step % window)


def _steps_made(accelerator: ZeroBase) -> int:
    """What the first optimizer says of itself; 0 when it says nothing."""
    optimizers = accelerator.zero_optimizers()
    if not optimizers:
        return 0
    first = next(iter(optimizers.values()))
    holder = getattr(first, "optim", first)
    steps = [values.get("step", 0) for values in holder.state.values() if isinstance(values, dict)]
    numbers = [int(step) for step in steps if isinstance(step, (int, float, torch.Tensor))]
    return max(numbers, default=0)
