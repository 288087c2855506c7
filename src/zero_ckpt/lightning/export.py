"""`Fp32Export`: when fit ends normally, the best checkpoint becomes one full fp32 state dict.

`ZeroStrategy` adds it to every fit by `attach_export`, and runs it from its own `on_train_end` by
`run_export`: after all callbacks and the module have had theirs, weight averaging included. Under
another strategy, or when there was nothing left to train, it runs when fit has ended.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from zero_ckpt.core.control import control_for_process_group
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.places import absolute
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32 import export_fp32
from zero_ckpt.fp32.layout import parse_size
from zero_ckpt.fp32.publishing import EXPORT_FOLDER, LIVE_TAG, output_of
from zero_ckpt.fp32.selection import check_dtype
from zero_ckpt.lightning.namespaces import Namespace, load
from zero_ckpt.lightning.paths import is_checkpoint_folder

if TYPE_CHECKING:
    from lightning.pytorch import Callback as Host
else:
    Host = object  # the Callback of either copy of Lightning comes after the mixin

__all__ = ["Fp32ExportMixin", "attach_export", "detach_export", "make_export", "run_export"]


class Fp32ExportMixin(Host):
    """Writes the weights of the best checkpoint as fp32, all ranks sharing the work, when fit ends.

    Best is what `ModelCheckpoint` monitors; without a monitor it is the last checkpoint, and the weights as they are
    when none was saved. A plain `.ckpt` file from before holds its weights whole: nothing is written of it.
    The result is in `fp32/` beside the checkpoint, or in the log directory, else in `default_root_dir`, and takes the
    place of an earlier one. An export that fails is a warning: the training is done,
    and its checkpoints are intact. Nothing is written after an exception, nor in a `fast_dev_run`, nor by
    `Trainer(barebones=True)`.

    dirpath: another folder to write to, or the URL of one.
    format: "safetensors", "bin" (`pytorch_model.bin`), or "ckpt" (for `load_from_checkpoint`).
    max_shard_size: bytes, or a text like "5GB"; more than that becomes several files and an index. None: one file.
    strip_prefix: names of parameters that start with it lose it.
    dtype: "fp32", "bf16", "fp16" or "keep", of floating parameters.
    exclude_frozen_parameters: leave out what has `requires_grad=False`.
    weights_only: False lets "ckpt" take over hyper-parameters that had to be pickled.

    Raises `ConfigurationError` for options that cannot work, and not when the training has ended.
    """

    namespace: ClassVar[Namespace]
    is_asked_for = True
    """False for the export that the strategy adds, which writes nothing when the trainer keeps no checkpoints."""
    is_attached = False
    """Whether the strategy has added it to the trainer, for one fit."""

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        format: str = "safetensors",
        max_shard_size: int | str | None = None,
        strip_prefix: str | None = None,
        dtype: str = "fp32",
        exclude_frozen_parameters: bool = False,
        weights_only: bool = True,
    ) -> None:
        super().__init__()
        output_of(EXPORT_FOLDER if dirpath is None else dirpath, format)
        check_dtype(dtype)
        if max_shard_size is not None:
            parse_size(max_shard_size)
        self.dirpath = dirpath
        self.options: dict[str, Any] = {
            "format": format,
            "max_shard_size": max_shard_size,
            "strip_prefix": strip_prefix,
            "dtype": dtype,
            "exclude_frozen_parameters": exclude_frozen_parameters,
            "weights_only": weights_only,
        }
        self._has_trained = self._is_done = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._has_trained = self._is_done = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._has_trained = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.run(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.is_attached:
            detach_export(trainer)

    def run(self, trainer: Any) -> None:
        """Collective: export once in this fit, or warn why that failed."""
        if self._is_done or trainer.fast_dev_run or trainer.barebones:
            return
        self._is_done = True
        try:
            self._export(trainer)
        except Exception as error:
            text = "the fp32 export failed; training and checkpoints are not affected"
            warn_on_first(trainer.global_rank, [f"{text}: {error}"])

    def _export(self, trainer: Any) -> None:
        strategy = trainer.strategy
        source = strategy.broadcast(best_checkpoint(trainer))
        if os.path.isfile(source) and _control_of(strategy) is not None:
            self._say(
                f"no fp32 export: the best checkpoint is {source}, a file from before, which holds its weights whole"
            )
        elif source:
            where = self._collapse(
                trainer, source, os.path.join(os.path.dirname(source), EXPORT_FOLDER)
            )
            self._say(f"fp32 weights of {source} are in {where}")
        elif self._has_trained and (self.is_asked_for or trainer.checkpoint_callbacks):
            folder = os.path.join(trainer.log_dir or trainer.default_root_dir, EXPORT_FOLDER)
            source = strategy.broadcast(os.path.join(absolute(folder), LIVE_TAG))
            trainer.save_checkpoint(source, weights_only=True)
            if (wait := getattr(strategy, "wait_for_saves", None)) is not None:
                wait()
            try:
                where = self._collapse(trainer, source, os.path.dirname(source))
                self._say(
                    f"the trained fp32 weights, of which no checkpoint was saved, are in {where}"
                )
            finally:
                strategy.remove_checkpoint(source)

    def _collapse(self, trainer: Any, source: str, folder: str) -> str:
        """Export `source`. Returns the path of the weights: of the index, if there are several files."""
        if not is_checkpoint_folder(source):
            raise ConfigurationError(
                f"{source} is no sharded checkpoint: use strategy='zero_ckpt' or ZeroCheckpointIO"
            )
        control = _control_of(trainer.strategy) or control_for_process_group()
        written = export_fp32(source, self.dirpath or folder, control=control, **self.options)
        return written[-1]

    def _say(self, text: str) -> None:
        self.namespace.module("utilities.rank_zero").rank_zero_info(text)


def _control_of(strategy: Any) -> Any:
    """What the ranks of a `ZeroStrategy` meet by; None of Lightning's own strategies."""
    return getattr(strategy, "control", None)


@cache
def make_export(namespace: str) -> type[Any]:
    """The callback's class for `lightning.pytorch` or `pytorch_lightning`."""
    copy = load(namespace)
    return copy.made("Fp32Export", Fp32ExportMixin, copy.callback)


def best_checkpoint(trainer: Any) -> str:
    """The path of the checkpoint to export, from the first `ModelCheckpoint` that has saved one; else ""."""
    for callback in trainer.checkpoint_callbacks:
        best = getattr(callback, "best_model_path", "")
        last = getattr(callback, "last_model_path", "")
        path = best or last if getattr(callback, "monitor", None) else last or best
        if path:
            return absolute(path)
    return ""


def attach_export(trainer: Any, namespace: Namespace, export: Any) -> None:
    """Give a fit its export, unless the user has added one or `export` is False. Call it in `setup`.

    `export`: True, False, or an `Fp32Export` to use.
    """
    if trainer.state.fn != "fit" or export is False:
        return
    if any(isinstance(callback, Fp32ExportMixin) for callback in trainer.callbacks):
        return
    if export is True:
        export = make_export(namespace.name)()
        export.is_asked_for = False
    export.is_attached = True
    trainer.callbacks.append(export)


def detach_export(trainer: Any) -> None:
    """Leave a trainer with the callbacks that its user gave it. Also called when a fit or a tuner's search ends."""
    trainer.callbacks = [c for c in trainer.callbacks if not getattr(c, "is_attached", False)]


def run_export(trainer: Any) -> None:
    """Collective: run the fit's exports now. Call it as the last thing of the strategy's `on_train_end`."""
    for callback in trainer.callbacks:
        if isinstance(callback, Fp32ExportMixin):
            callback.run(trainer)
