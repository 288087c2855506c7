"""`ZeroCheckpointIO`: the same checkpoints as a plugin, for Lightning's other strategies.

    Trainer(strategy="ddp", plugins=[ZeroCheckpointIO()])

Lightning calls a `CheckpointIO` on rank 0 only, with whole tensors: rank 0 writes everything, and
nothing here communicates. Under `ZeroStrategy` all ranks write, and the strategy does it itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.core.control import LocalControl
from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.state import Snapshot
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.lightning import paths
from zero_ckpt.lightning.content import VERSION_KEY, from_checkpoint, step_of, to_snapshot
from zero_ckpt.lightning.namespaces import checkpoint_io_bases, installed, load

if TYPE_CHECKING:
    from lightning.pytorch.plugins import CheckpointIO as _AllCheckpointIOs
else:
    _AllCheckpointIOs = type("_AllCheckpointIOs", checkpoint_io_bases(), {})

__all__ = ["ZeroCheckpointIO"]


class ZeroCheckpointIO(_AllCheckpointIOs):
    """Checkpoints as committed, verified folders, written by one process. Takes no arguments.

    A dict that is not a checkpoint of Lightning's (the weights that a spawning launcher hands back) is written as a
    plain file. Accepted by `lightning` and by `pytorch_lightning`.
    """

    def __init__(self) -> None:
        self._engine: SyncEngine | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Commit `checkpoint` at `path`, durable on return. Raises `SaveError` and leaves no trace when it cannot.

        `storage_options` are refused with `ConfigurationError`, and so are sharded tensors.
        """
        if storage_options is not None:
            raise ConfigurationError(
                f"ZeroCheckpointIO takes no storage_options, got {storage_options!r}: it writes to "
                "a mounted file system."
            )
        if VERSION_KEY not in checkpoint:
            _write_file(checkpoint, path)
            return
        _refuse_parts(checkpoint)
        directory, tag = paths.split(path)
        engine = self._local_engine()
        with _under_way(path), paths.making_way(engine, directory, tag) as make_way:

            def snapshot() -> Snapshot:
                make_way()
                return to_snapshot(checkpoint, None, {})

            engine.save(
                directory,
                tag,
                snapshot,
                step=step_of(checkpoint),
                zero_stage=0,
                save_latest=not tag.startswith("."),
            )

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The whole checkpoint, with all its tensors read and verified; or a file of Lightning's.

        `map_location`: a device to put tensors on; anything else leaves them on the CPU.
        `weights_only` None or True refuses objects that were stored as pickles.

        Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `FormatVersionError` or `UnsafeObjectError`.
        """
        if not paths.is_checkpoint_folder(path):
            paths.refuse_export(path)
            return load_file(path, map_location, weights_only)
        version = load(installed()[0]).version
        with open_checkpoint(path) as checkpoint:
            content = from_checkpoint(checkpoint, version, weights_only is not False)
            read: dict[str, Any] = _materialized(content, map_location, {})
            return read

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint of any kind. Never leaves a dangling link beside it.

        One that another thread is saving now (Lightning's `AsyncCheckpointIO` has one) is removed when it is there.
        """
        with _changed:
            _changed.wait_for(lambda: os.path.abspath(path) not in _saving)
        paths.remove(path)

    def teardown(self) -> None:
        """Free the buffers. Nothing is pending: a save is committed when it returns."""
        self._engine = None

    def _local_engine(self) -> SyncEngine:
        if self._engine is None:
            self._engine = SyncEngine(control=LocalControl())
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        return {"_engine": None}


_saving: list[str] = []
"""Paths of checkpoints that are being saved."""

_changed = threading.Condition()


@contextmanager
def _under_way(path: Any) -> Iterator[None]:
    saved = os.path.abspath(path)
    with _changed:
        _saving.append(saved)
    try:
        yield
    finally:
        with _changed:
            _saving.remove(saved)
            _changed.notify_all()


def load_file(path: Any, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint that Lightning wrote as one file, by Lightning's own loader."""
    given = {"map_location": map_location, "weights_only": weights_only}
    options = {name: value for name, value in given.items() if value is not None}
    loader = load(installed()[0]).torch_checkpoint_io()
    content: dict[str, Any] = loader.load_checkpoint(path, **options)
    return content


def _write_file(content: dict[str, Any], path: Any) -> None:
    """Write one file, whole and durable or not at all."""
    directory, name = os.path.split(os.path.abspath(os.fspath(path)))
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".{name}.part")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    LocalStorage().sync(directory)


def _refuse_parts(checkpoint: Mapping[str, Any]) -> None:
    weights = checkpoint.get("state_dict")
    parts = [k for k, v in weights.items() if isinstance(v, DTensor)] if weights else []
    if parts:
        raise ConfigurationError(
            f"ZeroCheckpointIO was given sharded tensors ({', '.join(parts[:3])}, ...) by a "
            "strategy that leaves saving to one process. Use strategy='zero_ckpt'."
        )


def _materialized(value: Any, map_location: Any, done: dict[int, Any]) -> Any:
    """`value` with lazy tensors read, and tensors on the device that was asked for."""
    if isinstance(value, torch.Tensor):
        if id(value) not in done:
            done[id(value)] = _placed(value, map_location)
        return done[id(value)]
    if type(value) is dict:
        return {k: _materialized(v, map_location, done) for k, v in value.items()}
    if type(value) is list:
        return [_materialized(v, map_location, done) for v in value]
    return value


def _placed(value: torch.Tensor, map_location: Any) -> torch.Tensor:
    tensor = value.materialize() if isinstance(value, LazyTensor) else value
    return tensor.to(map_location) if isinstance(map_location, (str, torch.device)) else tensor
