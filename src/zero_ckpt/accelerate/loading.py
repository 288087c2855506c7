"""`load_state`: from a checkpoint of ours into what the accelerator has prepared, all or nothing on every rank.

A folder that Accelerate wrote goes to Accelerate's own code.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.accelerate.base import ZeroBase
from zero_ckpt.accelerate.hooks import run_load_hooks
from zero_ckpt.accelerate.meeting import together
from zero_ckpt.accelerate.naming import candidates, is_accelerates, next_iteration
from zero_ckpt.accelerate.planning import PlanMixin, wanted_of
from zero_ckpt.accelerate.saving import SaveMixin
from zero_ckpt.accelerate.whole import sharding_what_is_loaded
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.finding import find_checkpoint
from zero_ckpt.core.load_plan import Wanted
from zero_ckpt.core.loading import load_together
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.outcome import log_report
from zero_ckpt.core.places import absolute, expanded, is_url, resolved
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.tag_folder import is_tag_folder
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    NothingSavedError,
    ZeroCkptError,
)

__all__ = ["LoadMixin"]


@dataclass(slots=True)
class Places:
    """Where a load looks. `candidates`: (folder, whether it is ours and not Accelerate's), to try in turn.

    `missing`: why there is none. `next_iteration`: the number of the next save under automatic naming.
    """

    candidates: list[tuple[str, bool]] = field(default_factory=list)
    missing: str = ""
    next_iteration: int | None = None


class LoadMixin(PlanMixin, SaveMixin):
    """Overrides of the accelerator that load."""

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        *,
        tag: str | int | None = None,
        missing_ok: bool = False,
        **load_model_func_kwargs: Any,
    ) -> Any:
        """Collective: load into everything that is prepared and registered. Returns the client state.

        What else there is to know of the load (path, report, this rank's own client state) is in `zero_loaded`.

        `input_dir`: a checkpoint directory, or a tag's folder itself, whoever wrote it (an accelerator, the Lightning
        strategy, a `Checkpointer`); None under `automatic_checkpoint_naming`: the newest one. `tag` None: what `latest`
        names, or, when that is missing or damaged, the newest checkpoint that verifies, with a warning. Any world size,
        stage and mesh loads any other. All or nothing: on an error nothing has changed on any rank.

        `load_kwargs={"weights_only": False}` allows pickled objects, whose opening can run code. Of
        `load_model_func_kwargs`: `strict`, `map_location` (checked as Accelerate does; state always lands where it
        lives), and `load_module_only`, `load_optimizer_states`, `load_lr_scheduler_states`, `custom_load_fn`,
        `override_hyperparameters` as in `Checkpointer`. `missing_ok`: where nothing was ever saved, warn, return None.

        Raises Accelerate's own errors for what it documents (ValueError for a folder that is not there, RuntimeError
        for another number of registered objects), and those of `zero_ckpt.errors` for the rest. For a folder that
        Accelerate wrote its own code takes over, and the result is None.
        """
        if not self.zero_is_ours:
            self._zero_pass_on("load_state", tag)
            return super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)
        self.zero_check_group("load_state")
        self.wait_for_saves()
        self._zero_runtime.loaded = None
        places = self._zero_find(input_dir, tag, missing_ok)
        if places.missing:
            text = f"NOTHING WAS LOADED, everything stays as it is: {places.missing}"
            warn_on_first(self.zero_control.rank, [text])
            return None
        for index, (directory, is_ours) in enumerate(places.candidates):
            try:
                if is_ours:
                    wanted = wanted_of(load_kwargs, load_model_func_kwargs)
                    client_state = self._zero_load(directory, tag, wanted)
                else:
                    client_state = None
                    self._zero_load_foreign(directory, load_kwargs, load_model_func_kwargs)
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                if index + 1 == len(places.candidates):
                    raise
                self._zero_warn(f"falling back to an older checkpoint, because {error}")
                continue
            break
        if places.next_iteration is not None:
            here = self.project_configuration.iteration
            self.project_configuration.iteration = max(here, places.next_iteration)
        self._zero_runtime.ended = False
        return client_state

    def _zero_find(self, input_dir: Any, tag: Any, missing_ok: bool = False) -> Places:
        """Collective: rank 0's answer to where to load from. `missing_ok`: that there is nothing is an answer, too."""

        def ask() -> str | None:
            if input_dir is not None:
                directory = expanded(input_dir)
                if not missing_ok and not is_url(directory) and not os.path.isdir(directory):
                    raise ValueError(f"Tried to find {directory} but folder does not exist")
                return directory
            if not self.project_configuration.automatic_checkpoint_naming:
                raise ValueError(
                    "No input_dir provided and automatic checkpoint naming is disabled."
                )
            return None

        checkpoints = os.path.join(self.project_dir or "", "checkpoints")
        naming = self.project_configuration.automatic_checkpoint_naming

        def decide(asked: list[Any]) -> dict[str, Any]:
            try:
                paths = list(candidates(checkpoints)) if asked[0] is None else [asked[0]]
                if missing_ok and asked[0] is not None:
                    self._zero_check_there(asked[0], tag)
            except NothingSavedError as error:
                if not missing_ok:
                    raise
                return {"missing": str(error)}
            return {
                "candidates": [(p, tag is not None or not is_accelerates(p)) for p in paths],
                "next_iteration": next_iteration(checkpoints) if naming else None,
            }

        timeout = self._zero_options.timeout
        found = Places(**together(self.zero_control, "load: folder", ask, decide, timeout))
        if input_dir is not None and found.candidates:
            # Each rank its own: a difference is then found out.
            found.candidates[0] = (expanded(input_dir), found.candidates[0][1])
        return found

    def _zero_check_there(self, directory: str, tag: Any) -> None:
        """Raises `NothingSavedError` where nothing was saved; other trouble shows when it is loaded."""
        if tag is None and os.path.isdir(directory) and is_accelerates(directory):
            return
        try:
            name = None if tag is None else str(tag)
            find_checkpoint(self.zero_engine.storage, absolute(directory), name)
        except NothingSavedError:
            raise
        except ZeroCkptError:
            return

    def _zero_load(self, directory: str, tag: Any, wanted: Wanted) -> Any:
        models = self._zero_run_load_hooks(directory)
        control = self.zero_control
        failures: list[RuntimeError] = []

        def prepare(checkpoint: Checkpoint) -> tuple[Restoration, Any]:
            objects = checkpoint.objects(wanted.weights_only)
            try:
                self._zero_check_custom(checkpoint.path, objects, wanted)
            except RuntimeError as error:
                failures.append(error)
                raise
            plan, result = self._zero_plan(checkpoint, objects, models, wanted)
            return plan, (plan, result, objects)

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
            plan, result, objects = loaded.prepared
            self._zero_runtime.loaded = result
            log_report(result.report, result.path, self.zero_control.rank)
            if not wanted.load_module_only:
                self._zero_tell_differences(checkpoint, objects)
            for notice in plan.notices:
                self._zero_warn(notice)
            return result.client_state

    def _zero_run_load_hooks(self, directory: str) -> dict[str, nn.Module]:
        """Models to load, by name. Hooks see the checkpoint directory, where save hooks wrote."""
        is_tag = is_tag_folder(self.zero_engine.storage, directory)
        shown = os.path.dirname(resolved(directory)) if is_tag else directory
        left: list[dict[str, nn.Module]] = []

        def run() -> None:
            left.append(run_load_hooks(self, shown))

        together(self.zero_control, "load: hooks", run, lambda _: None, self._zero_options.timeout)
        return left[0]

    def _zero_load_foreign(
        self, directory: str, load_kwargs: dict[str, Any] | None, kwargs: dict[str, Any]
    ) -> None:
        """A folder that Accelerate wrote, by its own code; steps are then known from the optimizer's state."""
        sharded = any(isinstance(p, DTensor) for m in self._models for p in m.parameters())
        with ExitStack() as taking_whole:
            if sharded and not self.is_fsdp2:
                self._zero_check_whole(directory)
                optimizers = self.zero_optimizers().values()
                taking_whole.enter_context(sharding_what_is_loaded(self._models, optimizers))
            super().load_state(directory, load_kwargs, **kwargs)
        self._zero_step = _steps_made(self) or self._zero_step

    def _zero_check_whole(self, directory: str) -> None:
        if any(name.startswith("pytorch_model_fsdp") for name in os.listdir(directory)):
            raise ConfigurationError(
                f"{directory} was written by Accelerate's FSDP plugin, whose format its own code loads only into a "
                f"model that the plugin has sharded; here it is sharded at stage {self.zero_stage}. Load it once "
                "with the plugin and stage=None, save_state(), and load that at any stage."
            )


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
