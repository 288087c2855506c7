"""`attach_trainer`: a `transformers.Trainer` whose checkpoints go through zero_ckpt.

`checkpoint-N/` keeps what others read in it (weights and config of Hugging Face, `trainer_state.json`, random
generators), and in place of `optimizer.pt` and `scheduler.pt` it is a checkpoint directory of ours with one tag,
`global_step{N}`: optimizer, scheduler and weights, sharded, verified and committed. Where that is, a resume takes the
weights from it too; a folder that the Trainer alone wrote resumes as ever.

The Trainer never calls `save_state`; what it does call for its optimizer and scheduler is overridden, by a subclass of
its own class. Its accelerator is attached as by `attach`. The Trainer finds its place in the data by itself, by
counting steps; only the epoch has to be told to the sampler before batches are skipped, which it forgets on several
processes, and samplers that know of no epoch get their generators back (`trainer_order`).

May not import transformers: what is needed of it is the Trainer that is given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from zero_ckpt.accelerate.attach import attach
from zero_ckpt.accelerate.base import ZeroBase, prepared_model
from zero_ckpt.accelerate.content import make_snapshot
from zero_ckpt.accelerate.hooks import Edits
from zero_ckpt.accelerate.meeting import together
from zero_ckpt.accelerate.trainer_order import EpochOrder
from zero_ckpt.accelerate.whole import shard_state_when_loaded, sharding_what_is_loaded
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.finding import find_checkpoint
from zero_ckpt.core.frameworks import unwrapped_optimizer
from zero_ckpt.core.handle import Committed, SaveHandle
from zero_ckpt.core.load_plan import Wanted
from zero_ckpt.core.loading import load_together
from zero_ckpt.core.per_rank import read_own
from zero_ckpt.core.places import absolute
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.state import Snapshot
from zero_ckpt.errors import ConfigurationError, ZeroCkptError
from zero_ckpt.zero.dropped import drop_gradients

if TYPE_CHECKING:
    from typing import Any as Host
else:
    Host = object  # the Trainer's own class comes after the mixin

__all__ = ["attach_trainer"]

T = TypeVar("T")
SCHEDULER = ""
"""The name of the Trainer's only scheduler: a single one is called "" in checkpoints."""

ORDER = "epoch_order"
"""Name of the object that each rank of a Trainer stores, and no other writer."""


class TrainerMixin(Host):  # type: ignore[misc]
    """All overrides; in front of a Trainer's class."""

    _zero_attach: dict[str, Any]
    """Arguments of `attach`."""
    _zero_kept: Sequence[tuple[Any, Any]] = ()
    """Models that were sharded by an earlier call of `train`."""
    _zero_order: EpochOrder

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; it may make another accelerator for another batch size."""
        super().create_accelerator_and_postprocess()
        attach(self.accelerator, **self._zero_attach)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which forgets what it has prepared when it trains again."""
        runtime = self.accelerator._zero_runtime
        self._zero_kept = [
            each for each in self._zero_kept if each[0] is prepared_model(self.model)
        ]
        runtime.shardings += [each for each in self._zero_kept if each not in runtime.shardings]
        for model, _ in self._zero_kept:
            drop_gradients(model)  # of a run that ended within an accumulation window
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._zero_kept = list(runtime.shardings)
        return prepared

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, **others: Any) -> Any:
        """As the Trainer's; the loader that skips batches does not hand the epoch on to a sharded sampler."""
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(epoch)
        if self.args.ignore_data_skip:
            self._zero_order.load(None)  # the epoch is another one, and takes what it finds
        self._zero_order.begin(epoch, train_dataloader)
        return super()._run_epoch(
            model=model, epoch=epoch, train_dataloader=train_dataloader, **others
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As the Trainer's; weights that we have sharded are gathered for the Hugging Face files."""
        if state_dict is None and self._zero_is_sharded():
            state_dict = self.accelerator.get_state_dict(self.model)
        super()._save(output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Collective: commit our part of `checkpoint-N`, which is durable on return."""
        accelerator: ZeroBase = self.accelerator
        if not accelerator.zero_is_ours:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        accelerator.zero_check_group("the Trainer's save")
        step, options = int(self.state.global_step), accelerator._zero_options
        os.makedirs(output_dir, exist_ok=True)
        handle = accelerator.zero_engine.save(
            output_dir,
            f"global_step{step}",
            lambda: self._zero_snapshot(step),
            step=step,
            zero_stage=accelerator.zero_stage,
            tag_validation=options.tag_validation,
            timeout=options.timeout,
        )
        handle.wait()  # the Trainer removes older checkpoints now
        accelerator._zero_runtime.saved = handle
        accelerator._zero_runtime.ended = False

    def _zero_snapshot(self, step: int) -> Snapshot:
        """This rank's references. The Trainer keeps the place in the data itself."""
        self._zero_bind_model()
        has_adapter = self._zero_has_adapter()
        snapshot = make_snapshot(self.accelerator, Edits(), {}, None, exclude_frozen=has_adapter)
        snapshot.objects["lr_schedulers"] = {SCHEDULER: self.lr_scheduler.state_dict()}
        snapshot.objects["global_step"] = step
        own = snapshot.rank_objects
        snapshot.rank_objects = {"rng": own["rng"], "buffers": own["buffers"]}
        snapshot.rank_objects[ORDER] = self._zero_order.state()
        return snapshot

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights from the Hugging Face files, unless a checkpoint of ours has them all: that is loaded later."""
        if self._zero_holds_model(resume_from_checkpoint):
            return
        kept = [each for each, _ in self._zero_kept if each is prepared_model(self.model)]
        with sharding_what_is_loaded(kept, []):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Collective: load all that a checkpoint of ours holds, all or nothing on every rank."""
        if checkpoint is not None and self._zero_is_our_folder(checkpoint):
            self._zero_load(checkpoint, Wanted(load_lr_scheduler_states=False))
            return
        if self._zero_is_sharded():
            shard_state_when_loaded(unwrapped_optimizer(self.optimizer))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """As the Trainer's, and for sharded weights too. `end_training` then exports the best weights."""
        best = self.state.best_model_checkpoint
        saved = self._zero_saved_in(best)
        self.accelerator._zero_runtime.saved = saved
        self.accelerator._zero_runtime.foreign = "" if saved is not None else best
        if not self._zero_is_sharded():
            super()._load_best_model()
        elif self._zero_holds_model(best):
            self._zero_load(best, Wanted(load_module_only=True))
        else:
            with sharding_what_is_loaded([self.model], []):
                super()._load_best_model()

    def _zero_saved_in(self, directory: str) -> SaveHandle | None:
        """The save that rank 0 finds there, or None for a folder that the Trainer alone wrote."""
        accelerator = self.accelerator
        if not self._zero_is_our_folder(directory):
            return None

        def find(_: Any) -> str | None:
            try:
                storage = accelerator.zero_engine.storage
                return find_checkpoint(storage, absolute(directory), None).folder
            except ZeroCkptError:
                return None

        timeout = accelerator._zero_options.timeout
        folder = together(accelerator.zero_control, "load: best", lambda: None, find, timeout)
        return None if folder is None else Committed(folder, os.path.basename(folder), {})

    def _zero_load(self, directory: str, wanted: Wanted) -> None:
        accelerator = self.accelerator
        accelerator.zero_check_group("the Trainer's load")
        self._zero_bind_model()

        def prepare(checkpoint: Checkpoint) -> tuple[Restoration, Restoration]:
            objects = checkpoint.objects()
            plan, _ = accelerator._zero_plan(checkpoint, objects, accelerator.zero_models(), wanted)
            schedulers = objects.get("lr_schedulers", {})
            same = checkpoint.manifest.world_size == accelerator.zero_control.world_size
            if not wanted.load_module_only:
                control, parts = accelerator.zero_control, {ORDER: EpochOrder.SHAPE}
                own = read_own(checkpoint, control, wanted.weights_only, parts)
                order = own.get(ORDER) if same else None
                plan.installs.append(lambda: self._zero_order.load(order))
            if not wanted.load_module_only and SCHEDULER in schedulers:
                state = schedulers[SCHEDULER]
                plan.installs.append(lambda: self.lr_scheduler.load_state_dict(state))
            return plan, plan

        loaded = load_together(
            accelerator.zero_engine.storage,
            accelerator.zero_control,
            directory,
            None,
            prepare,
            timeout=accelerator._zero_options.timeout,
        )
        loaded.checkpoint.close()
        for notice in loaded.prepared.notices:
            accelerator._zero_warn(notice)

    def _zero_is_our_folder(self, checkpoint: str) -> bool:
        """Whether a checkpoint of ours is to be loaded from there, by rank 0's answer."""
        if not self.accelerator.zero_is_ours or not os.path.isdir(checkpoint):
            return False
        ((_, is_ours),) = self.accelerator._zero_find(checkpoint, None).candidates
        return bool(is_ours)

    def _zero_holds_model(self, checkpoint: str) -> bool:
        """Whether it holds every weight: all but those of adapters, which are beside a model that is elsewhere."""
        return not self._zero_has_adapter() and self._zero_is_our_folder(checkpoint)

    def _zero_has_adapter(self) -> bool:
        return hasattr(self.accelerator.unwrap_model(self.model), "peft_config")

    def _zero_bind_model(self) -> None:
        """A Trainer that trains again prepares a wrapped model only once."""
        if not self.accelerator._models:
            self.accelerator._models.append(self.model_wrapped)

    def _zero_is_sharded(self) -> bool:
        return bool(self.accelerator._zero_is_sharded(self.model))


@cache
def _attached_class(own: Any) -> Any:
    body = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (TrainerMixin, own), body)


def attach_trainer(trainer: T, stage: int | None = None, **options: Any) -> T:
    """Let a `transformers.Trainer` save and resume through zero_ckpt. Returns the same trainer.

    Call it on every rank, once, before `train()`. `stage` and `options` are those of `attach`: stage None keeps how the
    Trainer shards (DDP, or FSDP2 by its arguments), 1, 2 and 3 shard optimizer state, gradients too, parameters too.
    `trainer.train(resume_from_checkpoint=...)` then resumes at any world size and stage, also from a folder that the
    Trainer alone wrote; FSDP1 and DeepSpeed stay the Trainer's own affair.

    Raises `ConfigurationError` for what is no Trainer, or options that do not fit.
    """
    given: Any = trainer
    if isinstance(given, TrainerMixin):
        raise ConfigurationError("this trainer is attached already: call attach_trainer once.")
    if not hasattr(given, "accelerator") or not hasattr(given, "_save_optimizer_and_scheduler"):
        raise ConfigurationError(
            f"attach_trainer expects a transformers.Trainer, found {type(given).__name__}. For an Accelerator, use "
            "attach."
        )
    attach(given.accelerator, stage, **options)
    own: Any = type(given)
    given.__class__ = _attached_class(own)
    given._zero_order = EpochOrder()
    given._zero_attach = {"stage": stage, **options}
    return trainer
