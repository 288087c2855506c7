"""`attach`: the accelerator becomes one of ours, by taking a subclass of its own class.

Nothing else can take over models, optimizers and schedulers without Accelerate writing them too: its hooks run after
FSDP models are written, and optimizers never pass through one. `isinstance` holds, `super()` is Accelerate's own code,
and an accelerator that is pickled comes back as what it was.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, TypeVar

from accelerate import Accelerator

from zero_ckpt.accelerate import data
from zero_ckpt.accelerate.base import Runtime
from zero_ckpt.accelerate.ending import EndMixin
from zero_ckpt.accelerate.loading import LoadMixin
from zero_ckpt.accelerate.options import Options
from zero_ckpt.accelerate.prepare import PrepareMixin
from zero_ckpt.core.async_save import AsyncSave
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import WrapPolicy

__all__ = ["ZeroAccelerator", "ZeroMixin", "attach", "detach"]

A = TypeVar("A")


class ZeroMixin(EndMixin, LoadMixin, PrepareMixin):
    """All overrides, in front of Accelerate's. `_zero_own`: the class without them."""

    _zero_own: ClassVar[Any]

    def zero_begin(self, options: Options) -> None:
        """Become attached: what `attach` does once the class has changed."""
        self._zero_options = options
        self._zero_runtime = Runtime()
        self.zero_check_launch()
        self.zero_check_stage()
        if self.zero_is_ours:
            _ = self.zero_engine  # makes this rank known, so that its death is seen by the others
            data.track_loaders(self)
        self.zero_count_steps()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the accelerator's own class, which can be imported; ours may have been made on the fly."""
        return _rebuild, (own_class(type(self)),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """The state without what belongs to this process."""
        # A user's class may have one; from Python 3.11 on every class has.
        inherited = getattr(super(), "__getstate__", None)
        state = dict(inherited() if inherited is not None else vars(self))
        state.pop("_zero_runtime", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        inherited = getattr(super(), "__setstate__", None)
        if inherited is not None:
            inherited(state)
        else:
            self.__dict__.update(state)
        self._zero_runtime = Runtime()
        self.zero_count_steps()


class ZeroAccelerator(ZeroMixin, Accelerator):  # type: ignore[misc]
    """An `Accelerator` that is attached from the start: `ZeroAccelerator(stage=2, mixed_precision="bf16")`.

    Takes the keyword arguments of `attach` and those of `Accelerator`, and raises what both raise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = Options.taken_from(kwargs)
        super().__init__(*args, **kwargs)
        self.zero_begin(options)


ZeroAccelerator._zero_own = Accelerator
_made: dict[Any, Any] = {Accelerator: ZeroAccelerator}


def attached_class(own: Any) -> Any:
    """The class of an accelerator of class `own` that is attached; always the same.

    Overrides of a user's class come before ours, and reach ours through `super()`.
    """
    if issubclass(own, ZeroMixin):
        return own
    if own not in _made:
        body = {"__module__": own.__module__, "__doc__": own.__doc__, "_zero_own": own}
        _made[own] = type(f"Zero{own.__name__}", (own, ZeroAccelerator), body)
    return _made[own]


def own_class(attached: type[Any]) -> Any:
    """The reverse of `attached_class`; a user's subclass of `ZeroAccelerator` itself."""
    return vars(attached).get("_zero_own", attached)


def _rebuild(own: Any) -> Any:
    kind = attached_class(own)
    return kind.__new__(kind)


def attach(
    accelerator: A,
    stage: int | None = None,
    *,
    wrap: WrapPolicy = "auto",
    sharding_size: int | None = None,
    cpu_offload: bool = False,
    export: str | os.PathLike[str] | bool = "auto",
    export_format: str = "safetensors",
    export_dtype: str = "fp32",
    max_shard_size: int | str | None = None,
    tag_validation: str = "warn",
    keep_last: int | None = None,
    timeout: float | None = None,
    async_save: bool | AsyncSave = False,
) -> A:
    """Let `accelerator` save, load and end its training through zero_ckpt. Returns the same accelerator.

    Call it once, on every rank; before `prepare()` for a `stage` or a `ZeroRedundancyOptimizer`, else at any time.

    stage: None keeps how Accelerate shards (DDP, its FSDP2 plugin). 0 is DDP, 1 shards optimizer state, 2 gradients
        too, 3 parameters too; `prepare()` then does it. With one process there is nothing to shard.
    wrap, sharding_size, cpu_offload: at stages 2 and 3, what to gather together, ranks that share one copy of
        the model (hybrid sharding), and whether parameters live in host memory. See `zero_ckpt.zero`.
    export: what `end_training()` does with the fp32 weights. "auto": those of the last save of this run go to `fp32/`
        in its checkpoint directory. A path: they go there, and without a save the live weights do. False: nothing.
    export_format: "safetensors" or "bin". max_shard_size: bytes, or a text like "5GB".
    export_dtype: "fp32", "bf16", "fp16" or "keep", of floating parameters.
    tag_validation: what to do when ranks give different directories or tags: "ignore", "warn" or "fail".
    keep_last: tags to keep in a checkpoint directory; None keeps all, 1 lets each save replace the one before.
    timeout: seconds of silence after which another rank counts as lost. Default 300.
    async_save: save beside the training: True, or an `AsyncSave` that says how. What goes wrong is then raised by the
        next `save_state`, by `wait_for_saves()`, `load_state()` or `end_training()`.

    Raises `ConfigurationError` for options that do not fit each other or the accelerator.
    """
    _become_attached(
        accelerator,
        Options(
            stage=stage,
            wrap=wrap,
            sharding_size=sharding_size,
            cpu_offload=cpu_offload,
            export=export,
            export_format=export_format,
            export_dtype=export_dtype,
            max_shard_size=max_shard_size,
            tag_validation=tag_validation,
            keep_last=keep_last,
            timeout=timeout,
            async_save=async_save,
        ),
    )
    return accelerator


def _become_attached(accelerator: Any, options: Options) -> None:
    """What `attach` does. On an error the accelerator is what it was; one that has these options already stays so."""
    if not isinstance(accelerator, Accelerator):
        raise ConfigurationError(f"expected an Accelerator, found {type(accelerator).__name__}")
    if isinstance(accelerator, ZeroMixin):
        if accelerator._zero_options != options:
            raise ConfigurationError(
                "this accelerator is attached already, with other options. Attach it once, or detach() it first."
            )
        return
    given: Any = accelerator
    given.__class__ = attached_class(type(given))
    try:
        given.zero_begin(options)
    except BaseException:
        detach(given)
        raise


def detach(accelerator: A) -> A:
    """Give an attached accelerator back to Accelerate. Returns the same accelerator.

    Models that were sharded at our stages 1 to 3 stay so; Accelerate alone cannot save them. Waits for saves that are
    under way, and raises what one of them failed with; the accelerator is detached then, too. Raises
    `ConfigurationError` for a subclass of `ZeroAccelerator`.
    """
    given: Any = accelerator
    if not isinstance(given, ZeroMixin):
        return accelerator
    own = own_class(type(given))
    if issubclass(own, ZeroMixin):
        raise ConfigurationError(
            f"{own.__name__} is a subclass of ZeroAccelerator, so it cannot be detached. Make an Accelerator instead."
        )
    given.zero_stop_counting()
    try:
        if given._zero_runtime.engine is not None:
            given._zero_runtime.engine.close()
    finally:
        given.__class__ = own
        for name in ("_zero_options", "_zero_runtime", "_zero_step"):
            given.__dict__.pop(name, None)
    return accelerator
