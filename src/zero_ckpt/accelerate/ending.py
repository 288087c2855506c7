"""`end_training`: the fp32 weights of the last save, written by all ranks together; then Accelerate's own end.

The export meets over the store, never over the training's process group, so a rank that is gone costs a bounded time:
the main process then writes the weights alone. An export that fails is a warning: the training is done, and its
checkpoints are intact.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from zero_ckpt.accelerate.huggingface import save_configuration
from zero_ckpt.accelerate.meeting import together
from zero_ckpt.accelerate.saving import SaveMixin
from zero_ckpt.core.control import ControlPlane, LocalControl
from zero_ckpt.core.handle import SaveHandle
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.places import absolute
from zero_ckpt.core.retention import remove_tag
from zero_ckpt.core.state import Snapshot, capture_models
from zero_ckpt.core.tag_folder import read_manifest
from zero_ckpt.errors import CheckpointNotFoundError, RankTimeoutError, ZeroCkptError
from zero_ckpt.fp32 import export_fp32
from zero_ckpt.fp32.publishing import EXPORT_FOLDER, LIVE_TAG

__all__ = ["EndMixin"]

_logger = logging.getLogger("zero_ckpt")


class EndMixin(SaveMixin):
    """The override of the accelerator's end."""

    def end_training(self) -> None:
        """Collective: wait for saves, export the fp32 weights, then do what Accelerate does.

        What is exported, and where to, is an option of `attach`. For a Hugging Face model the folder gets its
        configuration, so that `from_pretrained` opens it. A second call does nothing, unless `save_state` or
        `load_state` was called in between. Raises what kept a save beside the training from its commit; nothing is
        exported then.
        """
        if self._zero_runtime.ended:
            return
        self._zero_runtime.ended = True
        try:
            self.wait_for_saves()
        except ZeroCkptError:
            super().end_training()
            raise
        if self.zero_is_ours and self._zero_options.export is not False:
            try:
                self._zero_export()
            except Exception as error:
                text = "the fp32 export failed; training and checkpoints are not affected"
                warn_on_first(self.process_index, [f"{text}: {error}"])
        self.zero_stop_counting()
        super().end_training()

    def _zero_export(self) -> None:
        given = self._zero_options.export
        path = None if isinstance(given, bool) or given == "auto" else os.fspath(given)
        control = self._zero_export_control()
        if control is None:
            return  # the main process does it
        saved = self._zero_runtime.saved
        if saved is not None:
            directory = os.path.dirname(saved.path)
            target = path or f"{directory}/{EXPORT_FOLDER}"
            try:
                if self._zero_collapse(directory, saved.tag, target, control) and control.rank == 0:
                    _logger.info("the weights of %s are in %s", saved.path, target)
                return
            except CheckpointNotFoundError:
                if path is None:
                    text = "was removed after it was saved, so no weights were exported"
                    remedy = "Give attach an export=PATH, and the weights as they are go there."
                    warn_on_first(control.rank, [f"{saved.path} {text}. {remedy}"])
        if path is not None and self._models:
            self._zero_export_live(path, control)
        elif path is None and self._zero_runtime.foreign:
            text = (
                "has no save of zero_ckpt's (its Trainer was not attached, or saved with save_only_model=True), so no "
                "weights were exported. The Trainer's own files there have them. Give attach_trainer an export=PATH, "
                "and the weights as they are go there."
            )
            warn_on_first(control.rank, [f"{self._zero_runtime.foreign} {text}"])

    def _zero_export_control(self) -> ControlPlane | None:
        """Who shares the work; None for a rank that has no part, since the process group is gone."""
        if self.zero_control.world_size == self.num_processes:
            return self.zero_control
        return LocalControl() if self.is_main_process else None

    def _zero_export_live(self, path: str, control: ControlPlane) -> None:
        """Nothing was saved: export from a checkpoint of the live weights, which is removed afterwards."""
        folder = absolute(path)
        models = self.zero_models()

        def weights() -> Snapshot:
            state = capture_models(models)
            return Snapshot(
                model=state.tensors,
                objects={"extra_state": state.extra, "global_step": self._zero_step},
                buffers=frozenset(state.buffers),
                frozen=frozenset(state.frozen),
                aliases=state.aliases,
                experts=state.experts,
            )

        handle: SaveHandle = self.zero_engine.save(
            folder,
            LIVE_TAG,
            weights,
            step=self._zero_step,
            zero_stage=self.zero_stage,
            save_latest=False,
            timeout=self._zero_options.timeout,
        )
        handle.wait()
        try:
            if self._zero_collapse(folder, handle.tag, path, control) and control.rank == 0:
                _logger.info("the weights, of which nothing was saved, are in %s", path)
        finally:
            if control.rank == 0:
                remove_tag(self.zero_engine.storage, folder, handle.tag)

    def _zero_collapse(self, directory: str, tag: str, path: str, control: ControlPlane) -> bool:
        """Export one checkpoint. Returns whether it holds weights.

        Raises `CheckpointNotFoundError` on every rank when rank 0 does not find the save any more.
        """
        options: dict[str, Any] = {
            "format": self._zero_options.export_format,
            "dtype": self._zero_options.export_dtype,
            "max_shard_size": self._zero_options.max_shard_size,
            "timeout": self._zero_options.timeout,
        }

        def has_weights(_: Any) -> bool:
            manifest = read_manifest(self.zero_engine.storage, f"{directory}/{tag}")
            return bool(manifest.tensors["model"])  # else hooks keep them

        def collapse(control: ControlPlane) -> bool:
            if not together(control, "end: weights", lambda: None, has_weights, options["timeout"]):
                return False
            export_fp32(directory, path, tag, control=control, **options)
            return True

        try:
            exported = collapse(control)
        except RankTimeoutError:
            if control.rank != 0:
                raise
            exported = collapse(LocalControl())  # the other ranks are gone
        if not exported:
            return False
        models = list(self.zero_models().values())
        if control.rank == 0 and len(models) == 1:
            save_configuration(models[0], path, self._zero_options.export_dtype)
        return True
