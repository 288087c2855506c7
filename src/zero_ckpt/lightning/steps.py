"""Steps of the loops: run within the module's forward, with gradients reduced, scaled and clipped across ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from zero_ckpt import zero
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.lightning import epochs
from zero_ckpt.lightning.base import StrategyBase
from zero_ckpt.lightning.data import ResumableLoader, can_resume, make_reloaded, make_resumable
from zero_ckpt.lightning.windows import Windows
from zero_ckpt.zero.experts import attach_experts, shared_buffers
from zero_ckpt.zero.initial import broadcast_from_first
from zero_ckpt.zero.stepping import tell_remedy

__all__ = ["StepMixin"]

_UNUSED = "Expected to have finished reduction in the prior iteration"
"""How DDP's error about parameters without a gradient begins."""


def _clip_by_norm(plugin: Any, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
    zero.clip_grad_norm_(plugin.main_params(optimizer), clip_val)


def _clip_by_value(plugin: Any, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
    zero.clip_grad_value_(plugin.main_params(optimizer), clip_val)


class StepMixin(StrategyBase):
    """Overrides of the strategy that run between setup and teardown."""

    _zero_trainable = 0
    _zero_accumulating = False
    _zero_shared = False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """FSDP2 gathers parameters in hooks of the module's forward, so steps run inside it."""
        if self.stage < 2:
            return super().training_step(*args, **kwargs)
        with self.precision_plugin.train_step_context():
            return self._through_forward("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage < 2:
            return super().validation_step(*args, **kwargs)
        with self.precision_plugin.val_step_context():
            return self._through_forward("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage < 2:
            return super().test_step(*args, **kwargs)
        with self.precision_plugin.test_step_context():
            return self._through_forward("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage < 2:
            return super().predict_step(*args, **kwargs)
        with self.precision_plugin.predict_step_context():
            return self._through_forward("predict_step", *args, **kwargs)

    def _through_forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if not self._zero_shared:
            self._share_buffers()
        self._zero_shared = name != "training_step" or self._zero_accumulating
        assert self.model is not None
        assert self.lightning_module is not None
        return self._forward_redirection(self.model, self.lightning_module, name, *args, **kwargs)

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        super().post_backward(closure_loss)
        self._zero_windows.after_backward(self.optimizers)

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, *args, **kwargs)
        self._zero_windows.after_step(optimizer)
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients without communication inside."""
        assert self.model is not None
        self._zero_accumulating = True
        try:
            with zero.gradient_sync_disabled(self.model):
                yield
        finally:
            self._zero_accumulating = False

    def _share_buffers(self) -> None:
        """Give every rank rank 0's buffers (batch norm statistics, ...), as DDP does. Collective.

        In training before each pass that follows a step, so within an accumulation window each rank goes on with its
        own; else once, for they do not change.
        """
        if self.stage < 2 or self.world_size == 1 or self._zero_mesh is None:
            return
        if self._ddp_kwargs.get("broadcast_buffers", True):
            assert self.lightning_module is not None
            buffers = shared_buffers(self.lightning_module)
            if buffers:
                broadcast_from_first(buffers, self._zero_mesh)

    def on_validation_start(self) -> None:
        self.engine.fence()  # callbacks may exchange the weights for averaged ones
        super().on_validation_start()
        self._zero_shared = False

    def on_test_start(self) -> None:
        self.engine.fence()
        super().on_test_start()
        self._zero_shared = False

    def on_predict_start(self) -> None:
        self.engine.fence()
        super().on_predict_start()
        self._zero_shared = False

    def adapt_precision(self) -> None:
        """Let the precision plugin scale and clip gradients of which some are sharded."""
        plugin: Any = self.precision_plugin
        if isinstance(getattr(plugin, "scaler", None), torch.amp.GradScaler):
            plugin.scaler = zero.ShardedGradScaler.adopt(plugin.scaler)

        # No local functions: the trainer can be copied and pickled within fit.
        plugin.clip_grad_by_norm = partial(_clip_by_norm, plugin)
        plugin.clip_grad_by_value = partial(_clip_by_value, plugin)

    def restore_precision(self) -> None:
        """Undo `adapt_precision` but for the scaler, which keeps its state."""
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            vars(self.precision_plugin).pop(name, None)

    def process_dataloader(self, dataloader: object) -> object:
        """Training loaders learn to continue within an epoch; the others stay as they are."""
        trainer = self._current_trainer()
        if trainer is None or not (self.is_fitting and trainer.training):
            return super().process_dataloader(dataloader)
        bound = self._bind(trainer, dataloader)
        if isinstance(bound, ResumableLoader):
            bound.zero_belong(trainer)
        return bound

    def _bind(self, trainer: Any, dataloader: object) -> object:
        if self._zero_resumption is not None:
            return self._zero_resumption.bind(trainer, dataloader)
        if not isinstance(dataloader, DataLoader) or not can_resume(dataloader):
            return dataloader
        pending = self._zero_pending
        if pending is not None and pending.is_waiting:
            # Lightning then makes one iterator of it, and two in any other epoch.
            twice = bool(trainer.fit_loop.epoch_loop.restarting)
            return make_reloaded(dataloader, pending, twice=twice)
        return make_resumable(dataloader)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._zero_pending = None
        self._zero_windows = Windows()
        if self._zero_resumption is not None:
            trainer = self._current_trainer()
            epochs.begin_next(trainer.fit_loop)
            epochs.keep_reloads(trainer.fit_loop, trainer.reload_dataloaders_every_n_epochs)
            self._zero_resumption.settle(trainer.fit_loop)
            self._zero_pending = self._zero_resumption.pending
            self._zero_pending.at_train_start()
            assert self.lightning_module is not None
            warn_on_first(
                self.global_rank, [self._zero_resumption.reopen_window(self.lightning_module)]
            )
            self._zero_windows.after_backward(self.optimizers)
            self._zero_resumption = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if isinstance(self.model, DistributedDataParallel):
            self._wrap_anew_when_unfrozen(self.model)

    def configure_ddp(self) -> None:
        """One process alone has nobody to exchange gradients with: its model stays plain."""
        assert self.model is not None
        attach_experts(self.model)
        if self.world_size > 1:
            super().configure_ddp()
        self._zero_trainable = sum(p.requires_grad for p in self.model.parameters())

    def on_exception(self, exception: BaseException) -> None:
        """Replace DDP's error about parameters without a gradient by one that names this strategy's remedy."""
        remedy = (
            "a backward pass gave some trainable parameters no gradient, which DDP takes for an error. If that is "
            "intended (several optimizers that take turns, unused branches), use "
            f"ZeroStrategy(stage={self.stage}, find_unused_parameters=True), or stage 2 or 3."
        )
        exception.args = tuple(
            remedy if isinstance(text, str) and _UNUSED in text else text for text in exception.args
        )
        if self.stage >= 2:
            remedy = "Use ZeroStrategy(stage=1), where each rank updates whole ones."
            tell_remedy(exception, remedy)
        super().on_exception(exception)

    def _wrap_anew_when_unfrozen(self, wrapped: DistributedDataParallel) -> None:
        """Wrap the model anew when a finetuning callback has unfrozen parameters.

        DDP reduces gradients only of what was trainable when it wrapped the model.
        """
        if sum(p.requires_grad for p in wrapped.module.parameters()) > self._zero_trainable:
            self.model = wrapped.module
            self.configure_ddp()
