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
from typing import Any

import torch
from torch import nn

from zero_ckpt.core import rng
from zero_ckpt.core.agreement import check_tag_validation
from zero_ckpt.core.alone import check_all_save
from zero_ckpt.core.arguments import check_keep_last, check_timeout, check_zero_stage
from zero_ckpt.core.async_save import AsyncSave, async_save_of
from zero_ckpt.core.binding import OneOrMany, bound_names, check_kinds, named, snapshot_of
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.custom import CustomLoad
from zero_ckpt.core.decoupled import make_engine
from zero_ckpt.core.frameworks import unwrapped_model, unwrapped_optimizer
from zero_ckpt.core.handle import SaveHandle
from zero_ckpt.core.load_plan import Wanted, plan_training, plan_weights
from zero_ckpt.core.loading import load_together
from zero_ckpt.core.notices import alone_notice, warn_on_first, warn_user
from zero_ckpt.core.outcome import LoadResult, log_report, report_of
from zero_ckpt.core.per_rank import CLIENT_STATE, client_state_notice, own_client_state, read_own
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.state import Snapshot, capture_models, inferred_stage
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import NothingSavedError, ZeroCkptError

__all__ = ["Checkpointer"]


class Checkpointer:
    """Saves and loads checkpoints of the objects that it is given. Use it in a `with` statement, or `close` it.

    model, optimizer, lr_scheduler: one of each, a list of them, or a dict by name; the last two may be None. A
        scheduler is anything with `state_dict` and `load_state_dict`.
    zero_stage: 0 to 3, recorded in the manifest; None: inferred from the models and optimizers.
    keep_last: committed checkpoints to keep, at least 1; older ones are removed after each commit. None keeps all.
    tag_validation: what to do when ranks are given different tags or directories: "ignore" or "warn" (rank 0's counts),
        or "fail".
    timeout: seconds of silence after which another rank counts as lost; None: 300.
    rng: also save and restore random number generators, per rank.
    engine: "sync"; or "async", which saves beside the training, or an `AsyncSave` that says how.
    storage: where files go; None: the local disk, or the object store of a path's URL. Another one follows
        `zero_ckpt.core.storage.Storage`.

    `models`, `optimizers`, `lr_schedulers`: what was given, by name, without Fabric's or Accelerate's wrappers.
    `global_step`: steps that the first optimizer has made, going on from those of the checkpoint that was loaded.
    Raises `ConfigurationError` for arguments that cannot work.
    """

    def __init__(
        self,
        model: OneOrMany[nn.Module],
        optimizer: OneOrMany[torch.optim.Optimizer] | None = None,
        lr_scheduler: OneOrMany[Any] | None = None,
        *,
        zero_stage: int | None = None,
        keep_last: int | None = None,
        tag_validation: str = "warn",
        timeout: float | None = None,
        rng: bool = True,
        engine: str | AsyncSave = "sync",
        storage: Storage | None = None,
    ) -> None:
        models, optimizers = named(model, "models"), named(optimizer, "optimizers")
        self.models: dict[str, nn.Module] = {k: unwrapped_model(m) for k, m in models.items()}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: unwrapped_optimizer(each) for name, each in optimizers.items()
        }
        self.lr_schedulers: dict[str, Any] = named(lr_scheduler, "schedulers")
        check_kinds(self.models, self.optimizers, self.lr_schedulers)
        check_keep_last(keep_last)
        check_timeout(timeout)
        check_zero_stage(zero_stage)
        self._zero_stage, self._keep_last = zero_stage, keep_last
        self._tag_validation = check_tag_validation(tag_validation)
        self._timeout, self._rng = timeout, rng
        self._engine = make_engine(async_save_of(engine), storage)
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
        per_rank_client_state: Any = None,
    ) -> SaveHandle:
        """Save everything as `<save_dir>/<tag>/`, committed and durable on return (with `engine="sync"`).

        `tag` None: `global_step{N}`, N being the optimizer steps made (or `step`). `client_state`: any nested Python
        state; rank 0's is stored and given back by `load_checkpoint`. `save_latest`: move `latest` to this tag.
        `exclude_frozen_parameters`: leave out what has `requires_grad=False`; a load keeps the model's own values.
        `per_rank_client_state`: the same for each rank's own; a load at the same world size gives it back to its rank.
        `step`: orders checkpoints by age, and names this one where `tag` does not; None: `global_step`.

        Returns a handle that tells where the checkpoint is. With `engine="async"` that is before the commit, and what
        goes wrong is raised by the next save, by `wait` or by `close`. Weights and optimizer state may then change in
        `optimizer.step()`, which waits until they are copied; before any other change call the handle's `staged()`.

        Raises the same error on every rank, and then nothing was committed: `SaveError`, `RankTimeoutError`,
        `DisagreementError`, `StateMismatchError` (a tensor that cannot be stored) or `ConfigurationError`.
        """
        warn_on_first(0, [alone_notice()])
        step = self.global_step if step is None else step
        name = f"global_step{step}" if tag is None else str(tag)
        return self._engine.save(
            save_dir,
            name,
            lambda: self._snapshot(
                client_state, per_rank_client_state, step, exclude_frozen_parameters
            ),
            step=step,
            zero_stage=self.zero_stage,
            save_latest=save_latest,
            keep_last=self._keep_last,
            tag_validation=self._tag_validation,
            timeout=self._timeout,
        )

    def _snapshot(
        self, client_state: Any, per_rank: Any, step: int, exclude_frozen: bool
    ) -> Snapshot:
        check_all_save(self.models, self.optimizers, self._engine.control.world_size)
        snapshot = snapshot_of(
            capture_models(self.models),
            bound_names(self.models),
            self.optimizers,
            self.lr_schedulers,
            step=step,
            client_state=client_state,
            exclude_frozen=exclude_frozen,
        )
        if per_rank is not None:
            snapshot.rank_objects[CLIENT_STATE] = per_rank
        if self._rng:
            snapshot.rank_objects["rng"] = rng.capture(self._device())
        return snapshot

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: CustomLoad | None = None,
        *,
        override_hyperparameters: bool = False,
        missing_ok: bool = False,
        weights_only: bool = True,
        verify_first: bool = True,
    ) -> LoadResult:
        """Load into the live objects; returns `path, client_state`, with `.report` and `.per_rank_client_state`.

        `load_dir`: a checkpoint directory, or a tag's folder itself. `tag` None: what `latest` names, or, when that is
        missing or damaged, the newest checkpoint that verifies, with a warning. Any world size, stage and mesh loads
        any other. All or nothing: on an error nothing has changed on any rank.

        `load_module_strict=False`: load the weights whose names match; the others are logged, and in the report.
        `load_optimizer_states=False`, `load_lr_scheduler_states=False`: leave these as they are, and their files
        unread. `load_module_only`: weights and client state, nothing else. `custom_load_fn(src, dst)`: called for each
        model in place of loading its weights, with its stored state dict, whose tensors read when used, and the
        module. `override_hyperparameters`: every parameter group keeps the options that it has (learning rate, weight
        decay, ...) and every scheduler its base learning rates, instead of those in the checkpoint. `missing_ok`:
        where nothing was ever saved (no such directory or tag), warn and return `(None, None)`. `weights_only=False`
        allows pickled values in client states, whose opening can run code. `verify_first=False` leaves out the first
        pass over the bytes that overwrite live tensors: each block is still verified before it is copied, but damage
        that is found on the way leaves the live state partly overwritten, and the error says so.

        Raises the same error on every rank: `CheckpointNotFoundError`, `CorruptCheckpointError`, `StateMismatchError`
        (all missing, unexpected and misshapen keys at once), `FormatVersionError`, `UnsafeObjectError`,
        `DisagreementError` or `RankTimeoutError`; and what an earlier save with `engine="async"` failed with.
        """
        warn_on_first(0, [alone_notice()])
        self._engine.wait()
        wanted = Wanted(
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
            override_hyperparameters=override_hyperparameters,
            weights_only=weights_only,
        )
        try:
            return self._load(load_dir, tag, wanted, verify_first)
        except NothingSavedError as error:
            if not missing_ok:
                raise
            text = f"NOTHING WAS LOADED, everything stays as it is: {error}"
            warn_on_first(self._engine.control.rank, [text])
            return LoadResult(None, None)

    def _load(self, load_dir: Any, tag: Any, wanted: Wanted, verify_first: bool) -> LoadResult:
        loaded = load_together(
            self._engine.storage,
            self._engine.control,
            load_dir,
            None if tag is None else str(tag),
            lambda checkpoint: self._prepare(checkpoint, wanted),
            verify_first=verify_first,
            timeout=self._timeout,
        )
        with loaded.checkpoint as checkpoint:
            if wanted.optimizers:
                self.global_step = checkpoint.manifest.step
            plan, result = loaded.prepared
            log_report(result.report, checkpoint.path, self._engine.control.rank)
            warn_on_first(self._engine.control.rank, plan.notices)
            return result

    def _prepare(
        self, checkpoint: Checkpoint, wanted: Wanted
    ) -> tuple[Restoration, tuple[Restoration, LoadResult]]:
        control, rank = self._engine.control, self._engine.control.rank
        objects = checkpoint.objects(wanted.weights_only)
        plan = plan_weights(checkpoint, self.models, objects, wanted, control)
        report = report_of(plan)
        names, optimizers = bound_names(self.models), self.optimizers
        plan.add(
            plan_training(checkpoint, names, optimizers, self.lr_schedulers, objects, wanted, rank)
        )
        restores_rng = wanted.optimizers and self._rng
        parts = {"rng": rng.check} if restores_rng else {}
        own = read_own(checkpoint, control, wanted.weights_only, parts)
        plan.notices += filter(None, [client_state_notice(checkpoint, control.world_size, own)])
        if restores_rng:
            same = checkpoint.manifest.world_size == control.world_size
            plan.installs.append(rng.plan_restore(own.get("rng"), same, rank, self._device()))
            plan.notices += filter(None, [rng.world_size_notice(checkpoint, control.world_size)])
        mine = own_client_state(checkpoint, control, own)
        result = LoadResult(checkpoint.path, objects.get("client_state"), mine, report)
        return plan, (plan, result)

    @property
    def zero_stage(self) -> int:
        """As given, or what shards the state: 3 for DTensor parameters, 1 for ZeroRedundancyOptimizer, else 0."""
        if self._zero_stage is not None:
            return self._zero_stage
        return inferred_stage(self.models.values(), self.optimizers.values())

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

    def __exit__(self, kind: object, *_: object) -> None:
        """`close`; when the block has raised, that is what the caller sees, and a failed save is a warning."""
        try:
            self.close()
        except ZeroCkptError as error:
            if kind is None:
                raise
            warn_user(str(error))

    def _device(self) -> torch.device | None:
        return next((p.device for m in self.models.values() for p in m.parameters()), None)
