"""`Checkpointer`: a model, its optimizers and schedulers, bound to the core. For training loops without a framework.

    checkpointer = zero_ckpt.Checkpointer(model, optimizer, scheduler)
    checkpointer.save_checkpoint("checkpoints", client_state={"epoch": 3})
    path, client_state = checkpointer.load_checkpoint("checkpoints")

Models, optimizers and schedulers may each be one object, a list, or a dict by name. Saving and loading are collective:
every rank of the default process group calls them with the same arguments, whatever shards the model (FSDP2, DDP with
or without ZeroRedundancyOptimizer, nothing at all). The process groups of the training are never used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt.core import rng
from zero_ckpt.core.agreement import check_tag_validation
from zero_ckpt.core.binding import (
    bound_names,
    check_same_names,
    named,
    prefix_of,
    set_extra_state,
)
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.decoupled import AsyncSave, make_engine
from zero_ckpt.core.handle import SaveHandle
from zero_ckpt.core.loading import load_together
from zero_ckpt.core.restoring import Restoration, plan_model, plan_optimizer
from zero_ckpt.core.state import Snapshot, capture_models, capture_optimizer
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import ConfigurationError

__all__ = ["Checkpointer", "load_checkpoint", "save_checkpoint"]

T = TypeVar("T")
Some = Union[T, Sequence[T], Mapping[str, T]]  # noqa: UP007 - a generic alias at run time


class Checkpointer:
    """Saves and loads checkpoints of the objects that it is given.

    `zero_stage`: recorded in the manifest; found out from the objects when None. `keep_last`: committed checkpoints to
    keep, older ones are removed after each commit; None keeps all. `tag_validation`: what to do when ranks are given
    different tags or directories: `ignore` or `warn` (rank 0's counts), or `fail`. `timeout`: seconds of silence after
    which another rank counts as lost. `rng`: also save and restore random number generators, per rank. `engine`:
    "sync"; or "async", which saves beside the training, or an `AsyncSave` that says how.
    """

    def __init__(
        self,
        model: Some[nn.Module],
        optimizer: Some[torch.optim.Optimizer] | None = None,
        lr_scheduler: Some[Any] | None = None,
        *,
        zero_stage: int | None = None,
        keep_last: int | None = None,
        tag_validation: str = "warn",
        timeout: float | None = None,
        rng: bool = True,
        engine: str | AsyncSave = "sync",
        storage: Storage | None = None,
    ) -> None:
        self.models: dict[str, nn.Module] = named(model, "models")
        self.optimizers: dict[str, torch.optim.Optimizer] = named(optimizer, "optimizers")
        self.lr_schedulers: dict[str, Any] = named(lr_scheduler, "schedulers")
        if keep_last is not None and keep_last < 1:
            raise ConfigurationError(f"keep_last must be at least 1 or None, found {keep_last}")
        self._zero_stage, self._keep_last = zero_stage, keep_last
        self._tag_validation = check_tag_validation(tag_validation)
        self._timeout, self._rng = timeout, rng
        self._engine = make_engine(_async_save(engine), storage)
        self._engine.warm(self.models.values(), bool(self.optimizers))
        self.global_step = 0
        self._hook = self._count_steps()

    def _count_steps(self) -> Any:
        """Count the first optimizer's steps: `tag=None` means `global_step{N}`."""
        if not self.optimizers:
            return None
        first = next(iter(self.optimizers.values()))

        def stepped(*_: Any) -> None:
            self.global_step += 1

        return first.register_step_post_hook(stepped)

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        step: int | None = None,
    ) -> SaveHandle:
        """Save everything as `<save_dir>/<tag>/`, committed and durable on return (with `engine="sync"`).

        `tag` None: `global_step{N}`, N being the optimizer steps made (or `step`). `client_state`: any nested Python
        state; rank 0's is stored and given back by `load_checkpoint`. `save_latest`: move `latest` to this tag.
        `exclude_frozen_parameters`: leave out what has `requires_grad=False`; a load keeps the model's own values.

        Raises the same error on every rank (see `zero_ckpt.errors`); then nothing was committed. With `engine="async"`
        it returns before the commit, and what goes wrong is raised by the next save, by `wait` or by `close`. Weights
        and optimizer state may then change in `optimizer.step()`, which waits until they are copied; before any other
        change call the handle's `staged()`.
        """
        step = self.global_step if step is None else step
        name = f"global_step{step}" if tag is None else str(tag)
        return self._engine.save(
            save_dir,
            name,
            lambda: self._snapshot(client_state, step, exclude_frozen_parameters),
            step=step,
            zero_stage=self.zero_stage,
            save_latest=save_latest,
            keep_last=self._keep_last,
            tag_validation=self._tag_validation,
            timeout=self._timeout,
        )

    def _snapshot(self, client_state: Any, step: int, exclude_frozen: bool) -> Snapshot:
        state = capture_models(self.models)
        names = bound_names(self.models)
        optimizers = {
            name: capture_optimizer(optimizer, names, prefix_of(name))
            for name, optimizer in self.optimizers.items()
        }
        excluded = frozenset(state.frozen) if exclude_frozen else frozenset()
        return Snapshot(
            model={key: t for key, t in state.tensors.items() if key not in excluded},
            optim={key: t for o in optimizers.values() for key, t in o.tensors.items()},
            objects={
                "client_state": client_state,
                "global_step": step,
                "optimizers": {name: o.record for name, o in optimizers.items()},
                "lr_schedulers": {n: s.state_dict() for n, s in self.lr_schedulers.items()},
                "extra_state": state.extra,
            },
            rank_objects={"rng": rng.capture(self._device())} if self._rng else {},
            buffers=frozenset(state.buffers),
            frozen=frozenset(state.frozen) - excluded,
            aliases={k: v for k, v in state.aliases.items() if v not in excluded},
            excluded=excluded,
        )

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        *,
        weights_only: bool = True,
        verify_first: bool = True,
    ) -> tuple[str, Any]:
        """Load into the live objects; returns (path of the tag's folder, client state).

        `load_dir`: a checkpoint directory, or a tag's folder itself. `tag` None: what `latest` names, or, when that is
        missing or damaged, the newest checkpoint that verifies, with a warning. Any world size, stage and mesh loads
        any other. All or nothing: on an error nothing has changed on any rank. `weights_only=False` allows
        pickled values in the client state, whose opening can run code. `verify_first=False` reads everything once
        instead of twice: still no unverified byte is loaded, but damage found on the way leaves the live state partly
        overwritten, and the error says so.

        Raises the same error on every rank: `CheckpointNotFoundError`, `CorruptCheckpointError`, `StateMismatchError`
        (all missing, unexpected and misshapen keys at once), `FormatVersionError` or `UnsafeObjectError`.
        """
        with_optimizers = load_optimizer_states and not load_module_only
        with_schedulers = load_lr_scheduler_states and not load_module_only
        control = self._engine.control
        self._engine.wait()

        def prepare(checkpoint: Checkpoint) -> tuple[Restoration, dict[str, Any]]:
            objects = checkpoint.objects(weights_only)
            plan = plan_model(
                checkpoint, capture_models(self.models), control.rank, strict=load_module_strict
            )
            plan.installs.append(
                lambda: set_extra_state(self.models, objects.get("extra_state", {}))
            )
            if with_optimizers:
                self._plan_optimizers(plan, checkpoint, objects, weights_only)
            if with_schedulers:
                plan.installs.append(self._scheduler_install(checkpoint, objects))
            if with_optimizers and self._rng:
                plan.installs.append(
                    rng.plan_restore(checkpoint, control.rank, control.world_size, self._device())
                )
            return plan, objects

        loaded = load_together(
            self._engine.storage,
            control,
            load_dir,
            None if tag is None else str(tag),
            prepare,
            verify_first=verify_first,
            timeout=self._timeout,
        )
        with loaded.checkpoint as checkpoint:
            if with_optimizers:
                self.global_step = checkpoint.manifest.step
                notice = rng.world_size_notice(checkpoint, control.world_size)
                if self._rng and notice and control.rank == 0:
                    warnings.warn(notice, stacklevel=2)
            return checkpoint.path, loaded.prepared.get("client_state")

    def _plan_optimizers(
        self,
        plan: Restoration,
        checkpoint: Checkpoint,
        objects: dict[str, Any],
        weights_only: bool,
    ) -> None:
        names, rank = bound_names(self.models), self._engine.control.rank
        records = objects.get("optimizers", {})
        check_same_names(checkpoint.path, "optimizers", self.optimizers, records)
        for name, optimizer in self.optimizers.items():
            plan.add(
                plan_optimizer(
                    checkpoint,
                    optimizer,
                    names,
                    records[name],
                    rank,
                    prefix_of(name),
                    weights_only=weights_only,
                )
            )

    def _scheduler_install(self, checkpoint: Checkpoint, objects: dict[str, Any]) -> Any:
        saved = objects.get("lr_schedulers", {})
        check_same_names(checkpoint.path, "schedulers", self.lr_schedulers, saved)
        return lambda: [s.load_state_dict(saved[n]) for n, s in self.lr_schedulers.items()]

    @property
    def zero_stage(self) -> int:
        """What shards the state: 3 for DTensor parameters, 1 for ZeroRedundancyOptimizer, else 0."""
        if self._zero_stage is not None:
            return self._zero_stage
        if any(isinstance(p, DTensor) for m in self.models.values() for p in m.parameters()):
            return 3
        sharded = any(hasattr(o, "consolidate_state_dict") for o in self.optimizers.values())
        return 1 if sharded else 0

    def wait(self) -> None:
        """Return when every save is committed, or raise what kept one from that: the same error on every rank."""
        self._engine.wait()

    def close(self) -> None:
        """`wait`, and stop counting steps. Further saves and loads still work."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._engine.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _device(self) -> torch.device | None:
        return next((p.device for m in self.models.values() for p in m.parameters()), None)


def _async_save(engine: str | AsyncSave) -> bool | AsyncSave:
    if isinstance(engine, AsyncSave) or engine in ("sync", "async"):
        return engine if isinstance(engine, AsyncSave) else engine == "async"
    raise ConfigurationError(f"engine={engine!r}: expected 'sync', 'async' or an AsyncSave.")


def save_checkpoint(
    save_dir: str | os.PathLike[str],
    model: Some[nn.Module],
    optimizer: Some[torch.optim.Optimizer] | None = None,
    lr_scheduler: Some[Any] | None = None,
    *,
    tag: str | int | None = None,
    step: int | None = None,
    client_state: Any = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> SaveHandle:
    """One save without a `Checkpointer`. Steps are not counted, so `tag` or `step` must be given."""
    if tag is None and step is None:
        raise ConfigurationError(
            "save_checkpoint needs tag= or step=; a Checkpointer counts steps by itself"
        )
    with Checkpointer(model, optimizer, lr_scheduler) as checkpointer:
        return checkpointer.save_checkpoint(
            save_dir, tag, client_state, save_latest, exclude_frozen_parameters, step=step or 0
        )


def load_checkpoint(
    load_dir: str | os.PathLike[str],
    model: Some[nn.Module],
    optimizer: Some[torch.optim.Optimizer] | None = None,
    lr_scheduler: Some[Any] | None = None,
    *,
    tag: str | int | None = None,
    **options: Any,
) -> tuple[str, Any]:
    """One load without a `Checkpointer`; `options` as those of `Checkpointer.load_checkpoint`."""
    with Checkpointer(model, optimizer, lr_scheduler) as checkpointer:
        return checkpointer.load_checkpoint(load_dir, tag, **options)
