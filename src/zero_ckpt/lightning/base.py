"""What the parts of the strategy share: its settings, its engine, and where it is in a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from zero_ckpt.core.agreement import check_tag_validation
from zero_ckpt.core.arguments import check_sharding_options, check_timeout, check_zero_stage
from zero_ckpt.core.async_save import AsyncSave, check_async_save
from zero_ckpt.core.control import ControlPlane, meet_json
from zero_ckpt.core.decoupled import make_engine
from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.load_plan import Wanted
from zero_ckpt.core.outcome import LoadReport
from zero_ckpt.errors import ConfigurationError, ZeroCkptError, first_told, raise_for, to_record
from zero_ckpt.lightning.export import Fp32ExportMixin
from zero_ckpt.lightning.namespaces import Namespace
from zero_ckpt.lightning.pending_rng import PendingRng
from zero_ckpt.lightning.ranks import Resumption
from zero_ckpt.lightning.windows import Windows
from zero_ckpt.zero import Sharding, WrapPolicy
from zero_ckpt.zero.wrap import check_wrap

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as Host
else:
    Host = object  # the DDPStrategy of either copy of Lightning comes after the mixins

__all__ = ["INTERRUPTED_TIMEOUT", "Host", "StrategyBase"]

INTERRUPTED_TIMEOUT = 15.0
"""Seconds that a save in an exception handler waits for the other ranks: they may never come."""


class StrategyBase(Host):
    """Settings and state of the strategy. `namespace`: the copy of Lightning that it belongs to."""

    namespace: ClassVar[Namespace]
    load_report: LoadReport | None = None
    """Which weights the last load did not match."""
    _zero_engine: SyncEngine | None = None
    _zero_sharding: Sharding | None = None
    _zero_mesh: DeviceMesh | None = None
    _zero_resumption: Resumption | None = None
    """Where this rank's training continues; until it does."""
    _zero_pending: PendingRng | None = None
    """The random stream of a resumed run, in its first epoch."""
    _zero_is_alone = False
    """Whether other ranks did not come to a save after an exception."""

    def __init__(
        self,
        stage: int = 2,
        wrap: WrapPolicy = "auto",
        sharding_size: int | None = None,
        cpu_offload: bool = False,
        export: Any = True,
        *,
        exclude_frozen_parameters: bool = False,
        tag_validation: str = "ignore",
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        override_hyperparameters: bool = False,
        save_timeout: float | None = None,
        async_save: bool | AsyncSave = False,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Any = "popen",
        **ddp_options: Any,
    ) -> None:
        check_zero_stage(stage, "stage", or_none=False)
        check_sharding_options(stage, sharding_size, cpu_offload)
        check_wrap(wrap)
        _check_export(export)
        _check_async_save(async_save)
        check_timeout(save_timeout, "save_timeout")
        _check_ddp_options(ddp_options)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **ddp_options,
        )
        self.stage = stage
        self.wrap: WrapPolicy = wrap
        self.sharding_size = sharding_size
        self.cpu_offload = cpu_offload
        self.export = export
        self.save_timeout = save_timeout
        self.async_save = async_save
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self.tag_validation = check_tag_validation(tag_validation)
        self.wanted = Wanted(
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            override_hyperparameters=override_hyperparameters,
        )
        self._zero_windows = Windows()
        # Stage 1: the parts -> the user's optimizer, and the groups that the parts were made for.
        self._zero_partitions: dict[Optimizer, tuple[Optimizer, list[Any]]] = {}

    @property
    def engine(self) -> SyncEngine:
        """Saves checkpoints over the default process group's store, never over the group itself."""
        if self._zero_engine is None:
            self._zero_engine = make_engine(self.async_save)
        return self._zero_engine

    def wait_for_saves(self) -> None:
        """Return when every save is committed, or raise what kept one from that: the same error on every rank."""
        self.engine.wait()

    @property
    def control(self) -> ControlPlane:
        return self.engine.control

    @property
    def interrupted(self) -> bool:
        """Whether the run is being ended by an exception, so that other ranks may not make the same calls."""
        trainer = self._current_trainer()
        return trainer is not None and trainer.state.status == "interrupted"

    @property
    def is_fitting(self) -> bool:
        trainer = self._current_trainer()
        return trainer is not None and trainer.state.fn == "fit"

    def _current_trainer(self) -> Any:
        return None if self._lightning_module is None else self._lightning_module._trainer

    def _callbacks(self, *names: str) -> list[Any]:
        """The run's callbacks of Lightning's own classes with these names, as far as this Lightning has the classes."""
        trainer = self._current_trainer()
        known = self.namespace.module("callbacks")
        kinds = tuple(getattr(known, name) for name in names if hasattr(known, name))
        return [] if trainer is None else [c for c in trainer.callbacks if isinstance(c, kinds)]

    def _together(self, phase: str, action: Callable[[], None]) -> None:
        """Run `action`, a part of a load, on every rank; when it fails on any, raise that error on all."""
        failure: Exception | None = None
        try:
            action()
        except Exception as error:
            failure = error
        problem = [] if failure is None else to_record(failure)

        def decide(problems: list[Any]) -> None:
            if (told := first_told(problems, ZeroCkptError)) is not None:
                raise told

        try:
            meet_json(self.control, phase, problem, decide, self.save_timeout)
        except ZeroCkptError as error:
            raise_for(error, failure)

    def __getstate__(self) -> dict[str, Any]:
        """For launchers that pickle the strategy, and callbacks that copy it: without what belongs to this process."""
        here = ("_zero_engine", "_zero_sharding", "_zero_mesh", "_zero_source", "_zero_handed_out")
        return {**super().__getstate__(), **dict.fromkeys(here), "_zero_pristine": ()}


def _check_export(export: object) -> None:
    if not isinstance(export, (bool, Fp32ExportMixin)):
        raise ConfigurationError(
            f"export={export!r}: expected True, False or an Fp32Export, as Fp32Export('a/folder')."
        )


def _check_async_save(async_save: bool | AsyncSave) -> None:
    check_async_save(async_save)
    if isinstance(async_save, AsyncSave) and async_save.when_busy != "wait":
        raise ConfigurationError(
            f"async_save: when_busy={async_save.when_busy!r}, but ModelCheckpoint counts on every save that it "
            'asks for, and removes older ones: only "wait" is right under Lightning.'
        )


def _check_ddp_options(options: dict[str, Any]) -> None:
    """Refuse a misspelt argument at every stage: stages 2 and 3 would never look at it."""
    known = {"ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"}
    known |= set(inspect.signature(DistributedDataParallel.__init__).parameters) - {
        "self",
        "module",
    }
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"ZeroStrategy got unexpected keyword arguments: {', '.join(unknown)}")
