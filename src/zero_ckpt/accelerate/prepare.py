"""Our ZeRO stages, applied where Accelerate prepares models, optimizers and schedulers.

    stage 1     Accelerate wraps the model in DDP; every optimizer is partitioned, its schedulers drive the parts
    stages 2, 3 the model is sharded in place instead of being wrapped; optimizers are pointed at what is sharded

With stage None everything is prepared as Accelerate does it. A `ZeroRedundancyOptimizer` that the user has made is
accepted at stages None, 0 and 1: Accelerate alone would ask it for a state dict that it does not have.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zero_ckpt import zero
from zero_ckpt.accelerate import data
from zero_ckpt.accelerate.base import ZeroBase, prepared_model
from zero_ckpt.accelerate.buffers import share_buffers
from zero_ckpt.accelerate.stepping import tell_when_it_cannot_step
from zero_ckpt.core.frameworks import unwrapped_optimizer
from zero_ckpt.core.state import is_partitioned
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero.copies import allow_copies
from zero_ckpt.zero.dropped import drop_with_zero_grad
from zero_ckpt.zero.experts import attach_experts, expert_lists, expert_parameters
from zero_ckpt.zero.sync import gradient_sync

__all__ = ["PrepareMixin"]

OWN_KINDS = ("NO", "MULTI_")
"""Kinds of distributed training (as their names begin) that our stages can replace."""

EVALUATED = "_zero_evaluated"
"""Attribute of a model that was prepared for evaluation alone."""


class PrepareMixin(ZeroBase):
    """Overrides of the accelerator between `prepare` and the optimizer's step."""

    def zero_check_stage(self) -> None:
        """Raises `ConfigurationError` when this accelerator cannot train at the stage that was asked for."""
        stage = self._zero_options.stage
        if stage is None:
            return
        if not self.distributed_type.value.startswith(OWN_KINDS):
            raise ConfigurationError(
                f"stage={stage}, but this accelerator trains with {self.distributed_type.value}, which shards in its "
                "own way. Attach with stage=None, or make the Accelerator without that plugin."
            )
        if stage and getattr(self, "parallelism_config", None):
            raise ConfigurationError(
                f"stage={stage}, but this accelerator has a parallelism_config. Use Accelerate's FSDP plugin "
                "(fsdp_version=2) for combined parallelism, and attach with stage=None."
            )
        if stage and (self._models or self._optimizers):
            raise ConfigurationError(
                f"stage={stage}: models or optimizers are prepared already. Attach before accelerator.prepare()."
            )
        if stage >= 2 and self.scaler is not None:
            self.scaler = zero.ShardedGradScaler.adopt(self.scaler)

    @property
    def zero_stage_to_apply(self) -> int:
        """The stage to prepare for: 0 for a single process, which has nobody to share with."""
        alone = self.num_processes == 1 or not dist.is_initialized()
        return 0 if alone else self._zero_options.stage or 0

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As Accelerate's; at our stages models come first, since optimizers follow them."""
        prepared = self._zero_prepare(args, device_placement)
        if self.zero_is_ours and self._models:
            self.zero_engine.warm(self._models, bool(self._optimizers))
        return prepared

    def _zero_prepare(self, args: tuple[Any, ...], device_placement: list[bool] | None) -> Any:
        for each in args:
            if isinstance(each, nn.Module):
                self._zero_check_experts(each)  # Accelerate's FSDP shards before it prepares models
        if not self.zero_stage_to_apply:
            return super().prepare(*args, device_placement=device_placement)
        order = sorted(range(len(args)), key=lambda i: not isinstance(args[i], nn.Module))
        placement = None
        if device_placement is not None and len(device_placement) == len(args):
            placement = [device_placement[i] for i in order]
        elif device_placement is not None:
            placement = device_placement  # for Accelerate to refuse
        prepared = super().prepare(*(args[i] for i in order), device_placement=placement)
        if len(args) == 1:
            return prepared
        place = {index: position for position, index in enumerate(order)}
        return tuple(prepared[place[index]] for index in range(len(args)))

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> Any:
        """As Accelerate's; at stages 2 and 3 the model is sharded in place, and not wrapped."""
        stage = self.zero_stage_to_apply
        if evaluation_mode:
            return self._zero_prepare_for_evaluation(model, device_placement)
        if vars(model).pop(EVALUATED, False):
            del model._is_accelerate_prepared
        self._zero_check_experts(model)
        attach_experts(model)
        if stage < 2:
            return super().prepare_model(model, device_placement)
        self._zero_shard(model, stage)
        if getattr(model, "_is_accelerate_prepared", False):
            return super().prepare_model(model, device_placement)
        for optimizer in self._optimizers:  # prepared before their model
            self._zero_rebind(unwrapped_optimizer(optimizer))
        # Without wrapping: what is left is mixed precision and compilation.
        return super().prepare_model(model, device_placement=False, evaluation_mode=True)

    def _zero_prepare_for_evaluation(self, model: nn.Module, device_placement: bool | None) -> Any:
        """Prepare a model for evaluation, so that it can still be prepared for training later.

        Accelerate would take it for prepared already, and not wrap it: each rank would train alone.
        """
        is_new = not getattr(model, "_is_accelerate_prepared", False)
        prepared = super().prepare_model(model, device_placement, evaluation_mode=True)
        if is_new and self.distributed_type.value.startswith(OWN_KINDS):
            setattr(prepared, EVALUATED, True)
        return prepared

    def _zero_check_experts(self, model: nn.Module) -> None:
        """Raises `ConfigurationError` for declared experts under an engine of Accelerate's that would average them.

        Of its own engines only DDP can be kept from that.
        """
        if not expert_lists(model):
            return
        if not self.distributed_type.value.startswith(OWN_KINDS):
            raise ConfigurationError(
                f"the model has declared experts, which {self.distributed_type.value} would take for copies of each "
                "other. Make the Accelerator without that plugin, and attach with a stage of 0 to 3."
            )
        if self.scaler is not None and self.zero_stage_to_apply < 2:
            raise ConfigurationError(
                "mixed_precision='fp16' scales gradients on each rank alone, and ranks with different experts would "
                "skip different steps. Use bf16, or attach with stage=2 or 3."
            )

    def _zero_shard(self, model: nn.Module, stage: int) -> None:
        runtime, options = self._zero_runtime, self._zero_options
        is_new = not getattr(model, "_is_accelerate_prepared", False)
        model = getattr(model, "_orig_mod", model)  # inside torch.compile
        if runtime.mesh is None:
            kind = self.device.type
            runtime.mesh = zero.make_mesh(self.num_processes, options.sharding_size, kind)
        sharding = zero.shard_module(
            model,
            stage=stage,
            mesh=runtime.mesh,
            wrap=options.wrap,
            cpu_offload=options.cpu_offload,
        )
        allow_copies(model)
        runtime.shardings.append((model, sharding))
        if is_new and self.zero_shares_buffers:
            share_buffers(model, runtime.mesh)

    def _zero_rebind(self, optimizer: Optimizer) -> None:
        for model, sharding in self._zero_runtime.shardings:
            zero.rebind_optimizer(optimizer, sharding.replaced)
            drop_with_zero_grad(optimizer, model)

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        """As Accelerate's; at stage 1 the optimizer is partitioned, at stages 2 and 3 it gets sharded parameters."""
        stage = self.zero_stage_to_apply
        if not getattr(optimizer, "_is_accelerate_prepared", False):
            zero.check_optimizer(optimizer, stage)
            if stage == 1:
                whole, optimizer = optimizer, zero.partition_optimizer(optimizer)
                if whole is not optimizer:
                    self._zero_runtime.partitions.append((whole, optimizer))
            elif stage >= 2:
                if is_partitioned(optimizer):
                    raise ConfigurationError(
                        f"stage={stage} shards optimizer state already; a ZeroRedundancyOptimizer is for stages 0 and "
                        "1. Prepare the optimizer that it was made of."
                    )
                self._zero_rebind(optimizer)
            if is_partitioned(optimizer):
                device_placement = False  # Accelerate would ask for a state dict of all ranks
        prepared = super().prepare_optimizer(optimizer, device_placement)
        if stage >= 2:
            tell_when_it_cannot_step(prepared)
        self.zero_count_steps()
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """As Accelerate's; a scheduler of an optimizer that is partitioned drives the parts."""
        if not getattr(scheduler, "_is_accelerate_prepared", False):
            for whole, parts in self._zero_runtime.partitions:
                zero.rebind_scheduler(scheduler, whole, parts)
        return super().prepare_scheduler(scheduler)

    def prepare_data_loader(self, *args: Any, **kwargs: Any) -> Any:
        """As Accelerate's; the loader remembers its place."""
        prepared = super().prepare_data_loader(*args, **kwargs)
        if self.zero_is_ours:
            data.track_loaders(self)
        return prepared

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """As Accelerate's; after a load it continues the interrupted epoch in its own order."""
        return data.skip_first_batches(dataloader, num_batches)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """As Accelerate's; a model that we have sharded sends nothing inside."""
        if not self._zero_is_sharded(model):
            context: AbstractContextManager[None] = super().no_sync(model)
            return context
        return zero.gradient_sync_disabled(prepared_model(model))

    def trigger_sync_in_backward(self, model: nn.Module) -> AbstractContextManager[None]:
        """As Accelerate's; works for a model that we have sharded, too."""
        if not self._zero_is_sharded(model):
            context: AbstractContextManager[None] = super().trigger_sync_in_backward(model)
            return context
        return gradient_sync(prepared_model(model), True)

    def _zero_is_sharded(self, model: nn.Module) -> bool:
        inner = prepared_model(model)
        return any(inner is prepared_model(each) for each, _ in self._zero_runtime.shardings)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """As Accelerate's; at stages 2 and 3 the norm is that of the whole gradients, of which ranks have parts."""
        if not (self._zero_runtime.shardings or expert_parameters()):
            return super().clip_grad_norm_(parameters, max_norm, norm_type=norm_type)
        self.unscale_gradients()
        return zero.clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        if not self._zero_runtime.shardings:
            super().clip_grad_value_(parameters, clip_value)
            return
        self.unscale_gradients()
        zero.clip_grad_value_(parameters, clip_value)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        """As Accelerate's; of a model that we have sharded, all of it on rank 0, as under its FSDP plugin.

        Collective, over the training's process group, and with host memory for the whole model on rank 0. Raises
        `ConfigurationError` for a model with declared experts, of which no rank could hold all by their names.
        """
        if expert_lists(model):
            raise ConfigurationError(
                "the model has declared experts, which live on different ranks: there is no state dict of it in one "
                "process. Use save_state, and zero_ckpt.export_fp32 of what it wrote."
            )
        if not self._zero_is_sharded(model):
            return super().get_state_dict(model, unwrap=unwrap)
        rank = dist.get_rank()
        gathered = {}
        for key, value in prepared_model(model).state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if rank == 0:
                gathered[key] = whole.cpu() if isinstance(whole, torch.Tensor) else whole
        return gathered

    def free_memory(self, *objects: Any) -> Any:
        """As Accelerate's; optimizer steps are then counted from 0 again."""
        self.zero_stop_counting()
        self._zero_step = 0
        self._zero_runtime.shardings.clear()
        self._zero_runtime.partitions.clear()
        return super().free_memory(*objects)
