"""Restoring, in DDP's order of hooks at every stage.

`load_checkpoint` reads objects only; weights and optimizer state in the dict that it returns are
lazy. `load_model_state_dict` comes before the model is sharded, and hooks may have changed the
dict by then: it applies the weights at once where somebody may look at them before `setup` (a
callback that overrides `on_load_checkpoint`), else at the end of sharding, so that each rank reads
only its part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.loading import load_together
from zero_ckpt.core.naming import parameter_names
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.outcome import log_report
from zero_ckpt.core.per_rank import client_state_notice, own_client_state, read_own
from zero_ckpt.core.places import absolute
from zero_ckpt.core.reader import Request, Sharing
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.shares import verify_share
from zero_ckpt.core.tag_folder import is_tag_folder, nothing_at
from zero_ckpt.errors import DisagreementError, StateMismatchError
from zero_ckpt.lightning import paths
from zero_ckpt.lightning.base import StrategyBase
from zero_ckpt.lightning.checkpoint_io import ZeroCheckpointIO
from zero_ckpt.lightning.content import from_checkpoint
from zero_ckpt.lightning.kept import HandedOut
from zero_ckpt.lightning.optimizers import Pristine, plan_state
from zero_ckpt.lightning.ranks import restore_rank
from zero_ckpt.lightning.wanted import PER_RANK, follow_schedules, leave_out
from zero_ckpt.lightning.weights import load_weights

__all__ = ["RestoreMixin"]


@dataclass(frozen=True, slots=True)
class _Deferred:
    """Weights that wait for the model to be sharded."""

    state_dict: Mapping[str, Any]
    strict: bool


class RestoreMixin(StrategyBase):
    """Overrides of the strategy that load."""

    is_set_up = False
    _zero_source: Checkpoint | None = None
    _zero_handed_out: HandedOut | None = None
    _zero_pristine: tuple[Pristine, ...] = ()
    _zero_deferred: _Deferred | None = None
    _zero_asked = False

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def connect(self, model: Any) -> None:
        """A new run begins."""
        super().connect(model)
        self.is_set_up = False
        self._zero_asked = False
        self._zero_is_alone = False
        self._zero_deferred = None
        self._zero_resumption = None

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Lightning's checkpoint dict from a folder of ours (lazily) or a file that Lightning
        wrote.

        Collective. `weights_only` None or True refuses objects that were stored as pickles.
        """
        self._zero_asked = True
        self.wait_for_saves()
        path = self._agreed_path(os.fspath(checkpoint_path)) or ""
        self.close_checkpoint()
        if not self._is_ours(path):
            return self._only_wanted(self._load_file(path, weights_only))
        loaded = load_together(
            self.engine.storage,
            self.control,
            path,
            None,
            self._prepare(weights_only is not False),
            timeout=self.save_timeout,
        )
        self._zero_source = loaded.checkpoint
        content, notice = loaded.prepared
        self._tell([notice])
        self._zero_handed_out = HandedOut(content)
        content = self._only_wanted(content)
        states = content.get("optimizer_states", [])
        prefixes = [""] if len(states) == 1 else [f"{i}/" for i in range(len(states))]
        self._zero_pristine = tuple(
            Pristine.of(loaded.checkpoint, prefix, state)
            for prefix, state in zip(prefixes, states, strict=True)
        )
        if self.is_fitting and not self.wanted.module_only:
            self._zero_resumption = restore_rank(
                loaded.checkpoint,
                content,
                self.global_rank,
                self.world_size,
                self.root_device,
                weights_only is not False,
                self._current_trainer().accumulate_grad_batches,
            )
        return content

    def _prepare(
        self, weights_only: bool
    ) -> Callable[[Checkpoint], tuple[Restoration, tuple[dict[str, Any], str]]]:
        def prepare(checkpoint: Checkpoint) -> tuple[Restoration, tuple[dict[str, Any], str]]:
            with_optimizers = self.is_fitting and self.wanted.optimizers
            roles = ("model", "optim", "state") if with_optimizers else ("model", "state")
            verify_share(checkpoint, roles, self.control, self.replicated)
            content = from_checkpoint(
                checkpoint,
                self.namespace.version,
                weights_only,
                with_optimizers=with_optimizers,
            )
            own = read_own(checkpoint, self.control, weights_only)
            mine = own_client_state(checkpoint, self.control, own)
            if mine is not None:
                content[PER_RANK] = mine
            notice = client_state_notice(checkpoint, self.world_size, own)
            return Restoration(), (content, notice)

        return prepare

    def _only_wanted(self, content: dict[str, Any]) -> dict[str, Any]:
        """Without what a fit was not asked to restore."""
        if self.is_fitting:
            datamodule = getattr(self._current_trainer(), "datamodule", None)
            parts = [type(part).__qualname__ for part in (self.precision_plugin, datamodule)]
            leave_out(content, self.wanted, parts)
        return content

    def _tell(self, notices: list[str]) -> None:
        warn_on_first(self.global_rank, notices)

    def _has_no_schedules_by_design(self) -> bool:
        """Lightning's stochastic weight averaging takes the schedulers away when it resumes, and brings its own."""
        trainer: Any = self.lightning_module.trainer if self.lightning_module else None
        callbacks = trainer.callbacks if trainer is not None else []
        kinds = (kind.__name__ for callback in callbacks for kind in type(callback).__mro__)
        return not self.lr_scheduler_configs and "StochasticWeightAveraging" in kinds

    def _is_ours(self, path: str) -> bool:
        """Whether to read `path` as a sharded checkpoint; another plugin may write folders too."""
        if not paths.is_checkpoint_folder(path):
            return False
        io = self.checkpoint_io
        return isinstance(io, ZeroCheckpointIO) or is_tag_folder(self.engine.storage, path)

    def _load_file(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        torch.cuda.empty_cache()
        paths.refuse_export(path)
        try:
            content: dict[str, Any] = self.checkpoint_io.load_checkpoint(
                path, weights_only=weights_only
            )
        except FileNotFoundError as error:
            raise nothing_at(self.engine.storage, absolute(path)) from error
        return content

    def _agreed_path(self, path: str | None) -> str | None:
        """Rank 0's path. Raises when some ranks found a checkpoint and others none."""

        def decide(paths: list[Any]) -> Any:
            none = [rank for rank, each in enumerate(paths) if each is None]
            if none and len(none) < len(paths):
                found = next(each for each in paths if each is not None)
                raise DisagreementError(
                    f"ckpt_path names '{found}' on some ranks, and on ranks {none} there is no "
                    "checkpoint to resume from. Give the path itself, on a file system that all "
                    "ranks share."
                )
            return paths[0]

        agreed: str | None = self._meet("resume: path", path, decide, self.save_timeout)
        return agreed

    def agree_nothing_to_restore(self) -> None:
        """A rank that found no checkpoint meets here those that found one."""
        if not self._zero_asked:
            self._zero_asked = True
            self._agreed_path(None)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, or keep them for the end of `setup` (see the module's docstring)."""
        state_dict = checkpoint["state_dict"]
        if self._must_wait():
            self._zero_deferred = _Deferred(dict(state_dict), strict)
            return
        if not self.is_set_up and self.stage < 2:
            self.materialize_replicated()
        if not self.is_set_up and isinstance(
            self.precision_plugin, self.namespace.double_precision
        ):
            assert self.lightning_module is not None
            self.precision_plugin.convert_module(self.lightning_module)  # floats would round them
        self._load_weights(state_dict, strict)

    def materialize_replicated(self) -> None:
        raise AssertionError("a part of the strategy overrides this")

    def _must_wait(self) -> bool:
        if self.is_set_up or self.stage < 2:
            return False
        assert self.lightning_module is not None
        if any(parameter.is_meta for parameter in self.lightning_module.parameters()):
            return True
        return not self._somebody_may_look()

    def _somebody_may_look(self) -> bool:
        """Whether a callback sees the module between here and `setup`."""
        base = self.namespace.callback.on_load_checkpoint
        hooks = (getattr(c, "on_load_checkpoint", None) for c in self._current_trainer().callbacks)
        return any(getattr(hook, "__func__", hook) is not base for hook in hooks)

    def apply_deferred_weights(self) -> None:
        """Load what `load_model_state_dict` kept, now that the model is sharded."""
        deferred, self._zero_deferred = self._zero_deferred, None
        if deferred is not None:
            self._load_weights(deferred.state_dict, deferred.strict)

    def _load_weights(self, state_dict: Mapping[str, Any], strict: bool) -> None:
        assert self.lightning_module is not None
        source = self._zero_source

        def read(requests: list[Request]) -> None:
            if source is not None:
                self._together("resume: weights", lambda: self._read(source, requests))

        report = load_weights(
            self.lightning_module, state_dict, source, self.global_rank, read, strict=strict
        )
        self.load_report = report
        path = "the checkpoint" if source is None else source.path
        log_report(report, path, self.global_rank)

    def _read(self, source: Checkpoint, requests: list[Request]) -> None:
        try:
            source.plan_reads(requests).fill(self.control.beat, self.replicated)
        finally:
            source.close()  # files are opened again when they are needed again

    @property
    def replicated(self) -> Sharing | None:
        """Below stage 2 all ranks read the same weights: once from the disk, then from its cache."""
        several = self.stage < 2 and self.world_size > 1
        return Sharing(0, 1, frozenset({"model", "optim"})) if several else None

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore every optimizer; all of them, or none. Lightning restores the schedulers next."""
        source = self._zero_source
        path = "the checkpoint" if source is None else source.path
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        content = cast("dict[str, Any]", checkpoint)  # which Lightning goes on with
        notices = follow_schedules(content, schedulers, self.wanted, path)
        self._tell([] if self._has_no_schedules_by_design() else notices)
        states = checkpoint["optimizer_states"]
        if not states:
            return
        if len(states) != len(self.optimizers):
            raise StateMismatchError(
                f"the checkpoint has {len(states)} optimizers, configure_optimizers() returned "
                f"{len(self.optimizers)}. Return as many, in the same order."
            )
        assert self.lightning_module is not None
        self.follow_regrouping()
        names = parameter_names(self.lightning_module)
        plans = [
            plan_state(
                optimizer,
                state,
                names,
                self.global_rank,
                self._pristine(index),
                keep_options=self.wanted.keep_options,
            )
            for index, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True))
            if state
        ]
        if source is not None:
            requests = [request for plan in plans for request in (*plan.fresh, *plan.live)]
            self._together("resume: optimizers", lambda: self._read(source, requests))
        for plan in plans:
            plan.install()
            self._tell(plan.notices)
        self._zero_pristine = ()

    def follow_regrouping(self) -> None:
        raise AssertionError("a part of the strategy overrides this")

    def _pristine(self, index: int) -> Pristine | None:
        return self._zero_pristine[index] if index < len(self._zero_pristine) else None

    def read_what_is_kept(self) -> None:
        """Collective: all is restored. What hooks still hold of the checkpoint is read now."""
        handed_out, self._zero_handed_out = self._zero_handed_out, None
        source = self._zero_source
        self._zero_pristine = ()
        if handed_out is not None and source is not None:
            self._together("resume: what hooks kept", lambda: handed_out.read_kept(source))
            source.close()

    def close_checkpoint(self) -> None:
        """Forget the checkpoint that was loaded last."""
        source, self._zero_source = self._zero_source, None
        self._zero_handed_out = None
        self._zero_pristine = ()
        if source is not None:
            source.close()
