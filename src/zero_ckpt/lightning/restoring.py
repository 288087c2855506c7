"""Restoring, in DDP's order of hooks at every stage: weights, then optimizers, from the dict that `opening` made.

`load_model_state_dict` comes before the model is sharded, and hooks may have changed the dict by then. It applies the
weights at once where somebody may look at them before `setup` (a callback that overrides `on_load_checkpoint`), else at
the end of sharding, so that each rank reads only its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.fence import await_staged
from zero_ckpt.core.naming import parameter_names
from zero_ckpt.core.outcome import log_report
from zero_ckpt.core.reader import Request
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.errors import StateMismatchError
from zero_ckpt.lightning.opening import OpenMixin
from zero_ckpt.lightning.optimizers import Pristine, plan_state
from zero_ckpt.lightning.unfreezing import unfreeze_as_saved
from zero_ckpt.lightning.wanted import follow_schedules
from zero_ckpt.lightning.weights import load_weights

__all__ = ["RestoreMixin"]


@dataclass(frozen=True, slots=True)
class _Deferred:
    """Weights that wait for the model to be sharded."""

    state_dict: Mapping[str, Any]
    strict: bool


class RestoreMixin(OpenMixin):
    """Overrides of the strategy that put a checkpoint's content into the module and its optimizers."""

    is_set_up = False
    _zero_deferred: _Deferred | None = None

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
        self._zero_pending = None

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
        log_report(report, self._source_path(), self.global_rank)

    def _read(self, source: Checkpoint, requests: list[Request]) -> None:
        try:
            await_staged()
            source.plan_reads(requests).fill(self.control.beat, self.replicated)
        finally:
            source.close()  # files are opened again when they are needed again

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore every optimizer; all is read and checked before one changes. Lightning restores schedulers next."""
        self._ready_schedules(cast("dict[str, Any]", checkpoint))  # with which Lightning goes on
        self._unfreeze()
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
                keep_options=self.wanted.override_hyperparameters,
            )
            for index, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True))
            if state
        ]
        self._together("resume: optimizers", lambda: self._read_optimizers(plans))
        # The optimizers' own code runs here, and may fail on one rank only.
        self._together("resume: optimizers installed", lambda: _install(plans))
        for plan in plans:
            self._tell(plan.notices)
        self._zero_pristine = ()

    def _read_optimizers(self, plans: Sequence[Restoration]) -> None:
        if self._zero_source is not None:
            requests = [request for plan in plans for request in (*plan.fresh, *plan.live)]
            self._read(self._zero_source, requests)
        for plan in plans:
            plan.check()

    def _unfreeze(self) -> None:
        if self._zero_source is not None and self._callbacks("BaseFinetuning"):
            assert self.lightning_module is not None
            unfreeze_as_saved(self.lightning_module, self._zero_source)

    def _ready_schedules(self, content: dict[str, Any]) -> None:
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        notices = follow_schedules(content, schedulers, self.wanted, self._source_path())
        self._tell([] if self._has_no_schedules_by_design() else notices)

    def _has_no_schedules_by_design(self) -> bool:
        """Lightning's stochastic weight averaging takes the schedulers away when it resumes, and brings its own."""
        return not self.lr_scheduler_configs and bool(self._callbacks("StochasticWeightAveraging"))

    def _source_path(self) -> str:
        """What to call the checkpoint in messages."""
        return "the checkpoint" if self._zero_source is None else self._zero_source.path

    def follow_regrouping(self) -> None:
        raise AssertionError("a part of the strategy overrides this")

    def _pristine(self, index: int) -> Pristine | None:
        return self._zero_pristine[index] if index < len(self._zero_pristine) else None


def _install(plans: Iterable[Restoration]) -> None:
    for plan in plans:
        plan.install()
