"""What the parts of an attached accelerator share: its options, its engine, and what it has prepared.

Attributes that we add to an accelerator are called `_zero_...`. `_zero_runtime` belongs to this process, and is left
behind when an accelerator is pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from zero_ckpt.accelerate.options import Options
from zero_ckpt.core.binding import named
from zero_ckpt.core.control import ControlPlane
from zero_ckpt.core.decoupled import make_engine
from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.frameworks import unwrapped_optimizer
from zero_ckpt.core.handle import SaveHandle
from zero_ckpt.core.naming import whole_model
from zero_ckpt.core.outcome import LoadResult
from zero_ckpt.core.state import inferred_stage
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import Sharding

if TYPE_CHECKING:
    from accelerate import Accelerator as Host
else:
    Host = object  # the accelerator's own class comes after the mixins

__all__ = ["Host", "Runtime", "ZeroBase", "prepared_model"]

FOREIGN = ("DEEPSPEED", "MEGATRON_LM", "XLA")
"""Kinds of distributed training whose checkpoints are always left to Accelerate's own code."""


@dataclass(slots=True)
class Runtime:
    """What belongs to this process, and to the models that are prepared at present."""

    engine: SyncEngine | None = None
    mesh: DeviceMesh | None = None
    shardings: list[tuple[nn.Module, Sharding]] = field(default_factory=list)
    partitions: list[tuple[Optimizer, Optimizer]] = field(default_factory=list)  # (whole, parts)
    step_hook: Any = None
    saved: SaveHandle | None = None  # this run's last one
    foreign: str = ""  # a folder without a save of ours, whose weights the run ended with
    loaded: LoadResult | None = None  # by the last load
    ended: bool = False
    warned: bool = False


class ZeroBase(Host):  # type: ignore[misc]
    """Settings and state. Nothing here overrides Accelerate."""

    _zero_options: Options
    _zero_runtime: Runtime
    scaler: Any
    _zero_step = 0
    """Steps that the first optimizer has made."""

    @property
    def zero_engine(self) -> SyncEngine:
        if self._zero_runtime.engine is None:
            self._zero_runtime.engine = make_engine(self._zero_options.async_save)
        return self._zero_runtime.engine

    def wait_for_saves(self) -> None:
        """Return when every save is committed, or raise what kept one from that: the same error on every rank."""
        if self._zero_runtime.engine is not None:
            self._zero_runtime.engine.wait()

    @property
    def zero_control(self) -> ControlPlane:
        return self.zero_engine.control

    def zero_check_group(self, call: str) -> None:
        """Raises `ConfigurationError` when `call` would not reach all of the accelerator's processes.

        Without their group each would take itself for the only one, and write what the others write.
        """
        found, expected = self.zero_control.world_size, self.num_processes
        if expected > 1 and found != expected:
            raise ConfigurationError(
                f"{call}: this accelerator has {expected} processes, but their process group is gone (found a world "
                f"size of {found}): end_training() or destroy_process_group() has ended it. Nothing was written or "
                f"changed. Call {call} before that."
            )

    def zero_check_launch(self) -> None:
        """Raises `ConfigurationError` where Accelerate takes one process of several for the only one."""
        started = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.num_processes == 1 < started:
            raise ConfigurationError(
                f"this Accelerator takes its process for the only one, but {started} were started: each would train a "
                "model of its own, and all would save to one place. Without GPUs make it with Accelerator(cpu=True), "
                "and a transformers.Trainer with TrainingArguments(use_cpu=True). With debug_launcher make no "
                "Accelerator before the processes were started: they would have a copy of its state."
            )

    @property
    def zero_is_ours(self) -> bool:
        """Whether this kind of training is checkpointed by zero_ckpt, and not by Accelerate's own code."""
        kind = self.distributed_type
        if kind == DistributedType.FSDP:
            return bool(self.is_fsdp2)
        return kind.value not in FOREIGN

    @property
    def zero_shares_buffers(self) -> bool:
        """Whether all ranks have rank 0's buffers: not under Accelerate's FSDP, nor with `broadcast_buffers=False`."""
        given = self.ddp_handler
        wanted = given is None or bool(given.broadcast_buffers)
        return wanted and self.distributed_type != DistributedType.FSDP

    @property
    def zero_stage(self) -> int:
        """What shards the prepared models: 0, 1, 2 or 3."""
        if self._zero_runtime.shardings:
            return max(sharding.stage for _, sharding in self._zero_runtime.shardings)
        if self.distributed_type == DistributedType.FSDP:
            return 3 if self.state.fsdp_plugin.reshard_after_forward else 2
        return inferred_stage(self._models, self.zero_optimizers().values())

    @property
    def zero_loaded(self) -> LoadResult | None:
        """What the last `load_state` gave: path, client states, and what did not match. None before the first."""
        return self._zero_runtime.loaded

    def zero_models(self) -> dict[str, nn.Module]:
        """The prepared models by name. A model that was prepared twice is one model."""
        distinct: dict[int, nn.Module] = {}
        for model in self._models:
            distinct.setdefault(id(prepared_model(model)), model)
        return named(list(distinct.values()), "models")

    def zero_optimizers(self) -> dict[str, Optimizer]:
        """The optimizers inside Accelerate's wrappers, by name."""
        return named([unwrapped_optimizer(o) for o in self._optimizers], "optimizers")

    def zero_schedulers(self) -> dict[str, Any]:
        return named(list(self._schedulers), "schedulers")

    def zero_device(self) -> torch.device | None:
        return torch.device(self.device)

    def zero_count_steps(self) -> None:
        """Count the first optimizer's steps, from now on: `tag=None` means `global_step{N}`."""
        if self._zero_runtime.step_hook is not None or not self._optimizers:
            return

        def stepped(*_: Any) -> None:
            self._zero_step += 1

        first = unwrapped_optimizer(self._optimizers[0])
        self._zero_runtime.step_hook = first.register_step_post_hook(stepped)

    def zero_stop_counting(self) -> None:
        if self._zero_runtime.step_hook is not None:
            self._zero_runtime.step_hook.remove()
            self._zero_runtime.step_hook = None


def prepared_model(model: nn.Module) -> nn.Module:
    """What was prepared: the model inside DistributedDataParallel and `torch.compile`, also one compiled by regions.

    Wrappers of the user's own (activation checkpointing) stay around it: they may be what is sharded.
    """
    while True:
        model = whole_model(model)
        inside = vars(model).get("_orig_mod")  # as Accelerate marks what it compiles by regions
        if not isinstance(inside, nn.Module):
            return model
        model = inside
