"""`save_state`: everything that the accelerator has prepared, as one committed checkpoint of the core."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_ckpt.accelerate.base import ZeroBase
from zero_ckpt.accelerate.content import make_snapshot
from zero_ckpt.accelerate.hooks import Edits, Offered, run_save_hooks
from zero_ckpt.accelerate.meeting import together
from zero_ckpt.accelerate.naming import directory_for_save, retire
from zero_ckpt.core.agreement import place_notice
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.places import absolute, expanded, is_url
from zero_ckpt.core.state import Snapshot
from zero_ckpt.errors import ConfigurationError

__all__ = ["SaveMixin"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where all ranks save. `notice`: a warning that some were given another place, or ""."""

    directory: str
    tag: str
    notice: str


class SaveMixin(ZeroBase):
    """Overrides of the accelerator that save."""

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        client_state: Any = None,
        per_rank_client_state: Any = None,
        tag: str | int | None = None,
        **save_model_func_kwargs: Any,
    ) -> Path | str:
        """Collective: save everything as `<output_dir>/<tag>/`, committed and durable on return. Returns `output_dir`.

        With `async_save` the commit follows beside the training; `wait_for_saves` waits for it.

        `output_dir`: the checkpoint directory, or the URL of one in an object store; chosen by Accelerate's rules when
        `automatic_checkpoint_naming` is on.
        `tag` None: `global_step{N}`, N being the optimizer steps made. `client_state`: any nested Python state; rank
        0's is stored and given back by `load_state`. `per_rank_client_state`: the same for each rank's own; after a
        load at the same number of processes it is in `zero_loaded`. `safe_serialization` changes nothing: all files are
        safetensors. Of `save_model_func_kwargs`, `save_latest=False` does not move `latest`, and
        `exclude_frozen_parameters=True` leaves out what has `requires_grad=False`; others are for other kinds of
        training, as in Accelerate.

        Raises the same error on every rank (see `zero_ckpt.errors`); then nothing was committed. A hook's own error is
        raised on its rank. `ConfigurationError` after `end_training`, which ends the process group of several
        processes. DeepSpeed, FSDP1, Megatron-LM and XLA are saved by Accelerate's own code.
        """
        if not self.zero_is_ours:
            ours = {"client_state": client_state, "per_rank_client_state": per_rank_client_state}
            extra = {name: value for name, value in ours.items() if value is not None}
            self._zero_pass_on("save_state", tag)
            kwargs = {**save_model_func_kwargs, **extra}
            saved: Path = super().save_state(output_dir, safe_serialization, **kwargs)
            return saved
        self.zero_check_group("save_state")
        _check_places(output_dir, safe_serialization)
        name = f"global_step{self._zero_step}" if tag is None else str(tag)
        place = self._zero_save_place(output_dir, name)
        edits, offered = self._zero_run_save_hooks(place.directory)

        def snapshot() -> Snapshot:
            return make_snapshot(
                self,
                edits,
                offered.values,
                client_state,
                per_rank_client_state=per_rank_client_state,
                exclude_frozen=bool(save_model_func_kwargs.get("exclude_frozen_parameters", False)),
            )

        self._zero_save(place, snapshot, bool(save_model_func_kwargs.get("save_latest", True)))
        warn_on_first(self.zero_control.rank, [place.notice, self._zero_empty_notice(place)])
        return place.directory if is_url(place.directory) else Path(place.directory)

    def _zero_save(
        self, place: _Place, snapshot: Callable[[], Snapshot], save_latest: bool
    ) -> None:
        """Save what `snapshot` captures, and note it as this run's last save, unless it was skipped."""
        handle = self.zero_engine.save(
            place.directory,
            place.tag,
            snapshot,
            step=self._zero_step,
            zero_stage=self.zero_stage,
            save_latest=save_latest,
            keep_last=self._zero_options.keep_last,
            timeout=self._zero_options.timeout,
        )
        if not handle.skipped:
            self._zero_runtime.saved = handle
            self._zero_runtime.ended = False
            self._zero_retire(place.directory)
            self.project_configuration.iteration += 1

    def _zero_empty_notice(self, place: _Place) -> str:
        """A warning of a save before anything was prepared that it could hold; "" otherwise."""
        if self._models or self._optimizers or self._custom_objects:
            return ""
        return (
            f"{place.directory}/{place.tag} holds no weights and no optimizer: this accelerator has prepared none yet. "
            "Call save_state after prepare()."
        )

    def _zero_save_place(self, output_dir: Any, tag: str) -> _Place:
        """Where to save, agreed upon by all ranks before a hook sees the directory, or anything is made there.

        Under automatic naming it is what rank 0 finds.
        """
        naming = self.project_configuration.automatic_checkpoint_naming
        if not naming and output_dir is None:
            raise TypeError(
                "save_state() needs an output_dir, or an Accelerator whose ProjectConfiguration has "
                "automatic_checkpoint_naming=True: expected str, bytes or os.PathLike object, not NoneType"
            )
        own = "" if naming else expanded(output_dir)

        def ask() -> list[Any]:
            if naming:
                checkpoints = os.path.join(self.project_dir, "checkpoints")
                return [checkpoints, tag, self.save_iteration]
            return [absolute(own), tag, None]

        def decide(asked: list[list[Any]]) -> list[str]:
            directory, name, iteration = asked[0]
            places = [(directory if naming else each[0], each[1]) for each in asked]
            notice = place_notice(places, self._zero_options.tag_validation)
            if naming:
                directory = directory_for_save(directory, iteration)
            return [directory, name, notice]

        timeout = self._zero_options.timeout
        directory, name, notice = together(self.zero_control, "save: folder", ask, decide, timeout)
        if not naming and absolute(own) == directory:
            directory = own  # as it was given, for the hooks and for the result
        return _Place(directory, name, notice)

    def _zero_run_save_hooks(self, directory: str) -> tuple[Edits, Offered]:
        """Rank 0's edits, and what this rank's hooks were offered."""
        offered: list[Offered] = []

        def run() -> Any:
            if not is_url(directory):
                os.makedirs(directory, exist_ok=True)
            offered.append(run_save_hooks(self, directory))
            return offered[0].edits.as_record()

        record = together(
            self.zero_control,
            "save: hooks",
            run,
            lambda edits: edits[0],
            self._zero_options.timeout,
        )
        return Edits(*record), offered[0]

    def _zero_retire(self, directory: str) -> None:
        """Remove checkpoints beyond `total_limit`, when the new one is committed."""
        limit = self.project_configuration.total_limit
        naming = self.project_configuration.automatic_checkpoint_naming
        if limit is None or not naming or self.zero_control.rank != 0:
            return

        def act(committed: bool) -> None:
            if committed:
                notice = retire(os.path.dirname(directory), limit, directory)
                warn_on_first(0, [notice])  # only rank 0 comes here

        self.zero_engine.after_saves(act)

    def _zero_pass_on(self, call: str, tag: Any) -> None:
        """Accelerate's own code takes over. Raises `ConfigurationError` for what it cannot do."""
        if tag is not None:
            raise ConfigurationError(
                f"{call}: tag={tag!r}, but under {self.distributed_type.value} checkpoints are written and read by "
                "Accelerate's own code, which has no tags."
            )
        if not self._zero_runtime.warned:
            self._zero_runtime.warned = True
            kind = self.distributed_type.value
            text = f"under {kind} zero_ckpt leaves saving and loading to Accelerate's own code"
            warn_on_first(self.process_index, [text])


def _check_places(output_dir: Any, safe_serialization: Any) -> None:
    """Raises `ConfigurationError` for a client state or a tag that was given by place."""
    if isinstance(output_dir, Mapping):
        raise ConfigurationError(
            f"save_state: {output_dir!r} was given as output_dir. Give client_state by name."
        )
    if isinstance(safe_serialization, (Mapping, str)):
        raise ConfigurationError(
            f"save_state: {safe_serialization!r} was given as safe_serialization, which is Accelerate's second "
            "argument. Give client_state and tag by name."
        )
