"""Saving: Lightning's checkpoint dict as one committed, sharded checkpoint.

Making the dict communicates nothing; the save itself meets over the process group's store. So a
rank that saves alone (in an exception handler) gets an error in bounded time, and never disturbs
the training's collectives.
"""

from __future__ import annotations

from typing import Any

from zero_ckpt.core.control import DEFAULT_TIMEOUT
from zero_ckpt.core.naming import parameter_names
from zero_ckpt.core.notices import warn_user
from zero_ckpt.core.per_rank import CLIENT_STATE
from zero_ckpt.core.state import Snapshot
from zero_ckpt.errors import ConfigurationError, RankTimeoutError, ZeroCkptError
from zero_ckpt.lightning import epochs, paths
from zero_ckpt.lightning.base import INTERRUPTED_TIMEOUT, StrategyBase
from zero_ckpt.lightning.checkpoint_io import ZeroCheckpointIO
from zero_ckpt.lightning.content import ModuleNames, step_of, to_snapshot
from zero_ckpt.lightning.gathering import gather_content
from zero_ckpt.lightning.optimizers import pruned_names, state_of
from zero_ckpt.lightning.ranks import capture_rank
from zero_ckpt.lightning.wanted import PER_RANK
from zero_ckpt.zero.experts import expert_lists

__all__ = ["SaveMixin"]


class SaveMixin(StrategyBase):
    """Overrides of the strategy that save and remove."""

    @property
    def checkpoint_io(self) -> Any:
        """`ZeroCheckpointIO` unless the user gave another; also inside empty wrappers."""
        if self._checkpoint_io is None:
            self._checkpoint_io = ZeroCheckpointIO()
        elif isinstance(self._checkpoint_io, self.namespace.wrapping_checkpoint_io):
            wrapper: Any = self._checkpoint_io
            while isinstance(wrapper.checkpoint_io, self.namespace.wrapping_checkpoint_io):
                wrapper = wrapper.checkpoint_io
            if wrapper.checkpoint_io is None:
                wrapper.checkpoint_io = ZeroCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        self._checkpoint_io = io

    @property
    def has_foreign_io(self) -> bool:
        """Whether the user's plugin writes checkpoints, and not this strategy."""
        return not isinstance(self.checkpoint_io, ZeroCheckpointIO)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's part of the weights: sharded ones as DTensors."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This rank's part of an optimizer's state, by parameter names."""
        raw = getattr(optimizer, "_optimizer", optimizer)  # out of a LightningOptimizer
        assert self.lightning_module is not None
        names = parameter_names(self.lightning_module)
        if not any(id(p) in names for group in raw.param_groups for p in group["params"]):
            return {}  # Lightning's stand-in for "no optimizer"
        return state_of(raw, names, self._names_without_pruning())

    def _names_without_pruning(self) -> dict[str, str]:
        """Present name -> unpruned name, where `ModelPruning` stores parameters as if they had never been pruned."""
        if not any(c._make_pruning_permanent for c in self._callbacks("ModelPruning")):
            return {}
        assert self.lightning_module is not None
        return pruned_names(self.lightning_module)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Collective: commit `checkpoint` at `filepath`, or raise the same error on every rank.

        With `async_save` the commit follows, and what goes wrong is raised by the next save or when fit ends.

        In an exception handler a failure is a warning: the exception shall surface, not it. When other
        ranks did not come to one such save, those after it are left out: they would wait in vain.
        """
        if self.has_foreign_io:
            self._save_by_plugin(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise ConfigurationError(
                "storage_options are for CheckpointIO plugins that write single files; zero_ckpt "
                f"writes to a mounted file system. Got {storage_options!r}."
            )
        if not self.interrupted:
            self._zero_is_alone = False
            self._save(checkpoint, filepath, self.save_timeout)
            return
        if self._zero_is_alone:
            return
        try:
            self._save(
                checkpoint, filepath, min(self.save_timeout or DEFAULT_TIMEOUT, INTERRUPTED_TIMEOUT)
            )
        except (ZeroCkptError, OSError) as error:
            self._zero_is_alone = isinstance(error, RankTimeoutError)
            warn_user(f"no checkpoint was written at {filepath}: {error}")

    def _save_by_plugin(self, checkpoint: dict[str, Any], filepath: Any, options: Any) -> None:
        """Gather everything on rank 0 and let the user's `CheckpointIO` write it."""
        if self.interrupted and self.world_size > 1:
            warn_user(
                f"no checkpoint was written at {filepath}: {type(self.checkpoint_io).__name__} "
                "writes from one process, and after an exception the ranks cannot be gathered"
            )
            return
        assert self.lightning_module is not None
        if expert_lists(self.lightning_module):
            raise ConfigurationError(
                "the model has declared experts, which live on different ranks, and "
                f"{type(self.checkpoint_io).__name__} writes from one process. Leave that plugin out."
            )
        capture_rank(self._current_trainer(), checkpoint, self.root_device, self._zero_windows)
        content = gather_content(checkpoint, self.global_rank, self.world_size)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(content, filepath, storage_options=options)

    def _save(self, checkpoint: dict[str, Any], filepath: Any, timeout: float | None) -> None:
        directory, tag = paths.split(filepath)
        with paths.making_way(self.engine, directory, tag) as make_way:

            def snapshot() -> Snapshot:
                if self.is_global_zero:
                    make_way()
                return self._snapshot(checkpoint)

            handle = self.engine.save(
                directory,
                tag,
                snapshot,
                step=step_of(checkpoint),
                zero_stage=self.stage,
                save_latest=not tag.startswith("."),  # a tuner's temporary checkpoint
                tag_validation=self.tag_validation,  # names may be found per rank
                timeout=timeout,
            )
        if self.interrupted or self._links_to_last():
            handle.wait()
        elif self._weights_may_be_exchanged():
            self.engine.fence()

    def _snapshot(self, checkpoint: dict[str, Any]) -> Snapshot:
        assert self.lightning_module is not None
        own = capture_rank(
            self._current_trainer(), checkpoint, self.root_device, self._zero_windows
        )
        if PER_RANK in checkpoint:
            own[CLIENT_STATE] = checkpoint.pop(PER_RANK)
        names, exclude = ModuleNames.of(self.lightning_module), self.exclude_frozen_parameters
        return to_snapshot(checkpoint, names, own, exclude_frozen=exclude)

    def _links_to_last(self) -> bool:
        """Whether Lightning will point a link to this checkpoint as soon as the save returns."""
        trainer = self._current_trainer()
        callbacks = [] if trainer is None else trainer.checkpoint_callbacks
        return any(getattr(callback, "save_last", None) == "link" for callback in callbacks)

    def _weights_may_be_exchanged(self) -> bool:
        """Whether a callback may put averaged weights in the place of the model's, without an optimizer's step.

        They do when an epoch begins or the training ends. (Before a validation the strategy itself waits.)
        """
        trainer = self._current_trainer()
        if trainer is None or (epochs.is_within(trainer) and not trainer.fit_loop.done):
            return False
        return bool(self._callbacks("StochasticWeightAveraging", "WeightAveraging"))

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint of any kind; rank 0 does it. Never leaves a dangling `last`.

        When the save that it makes room for is committed; if it never is, what was to be removed stays.
        """
        if self.is_global_zero and self.has_foreign_io:
            self.checkpoint_io.remove_checkpoint(filepath)
        elif self.is_global_zero:
            self.engine.after_saves(lambda committed: paths.remove(filepath) if committed else None)
