"""`load_module`: `LightningModule.load_from_checkpoint` for a sharded checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.lightning.content import from_checkpoint
from zero_ckpt.lightning.kept import HandedOut
from zero_ckpt.lightning.namespaces import Namespace, installed, load
from zero_ckpt.lightning.paths import is_checkpoint_folder, refuse_export
from zero_ckpt.zero.initial import materialize

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["load_module"]

Module = TypeVar("Module", bound="LightningModule")


def load_module(
    module_class: type[Module],
    path: str | os.PathLike[str],
    *,
    tag: str | int | None = None,
    map_location: torch.device | str | int | None = None,
    strict: bool | None = None,
    weights_only: bool = True,
    **kwargs: Any,
) -> Module:
    """A `module_class` with the hyper-parameters and weights of a checkpoint, in one process.

    What `module_class.load_from_checkpoint` does with a file: hyper-parameters come from the
    checkpoint and `kwargs` override them, `configure_model` and `on_load_checkpoint` are called,
    weights are loaded as they were saved (not converted to fp32). They are read one by one,
    straight from the shard files; those of optimizer state are not opened. What `configure_model`
    makes on the meta device gets memory, and the values of its `reset_parameters` where the
    checkpoint has none.

    path: a checkpoint's folder, or a checkpoint directory, of which `tag` or else the latest is
        loaded. A file of Lightning's is loaded by Lightning.
    map_location: the device to put the module on; None: the CPU.
    strict: as in `load_state_dict`; None: the module's `strict_loading`.
        Frozen parameters that were left out of the save keep the values that the class gives them.
    weights_only: False allows hyper-parameters that were stored as pickles, whose opening can run
        code.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `FormatVersionError`,
    `UnsafeObjectError`, and what the module's own `__init__` and `load_state_dict` raise.
    """
    if tag is None and not is_checkpoint_folder(path) and os.path.isfile(path):
        refuse_export(path)
        return module_class.load_from_checkpoint(
            os.fspath(path),
            map_location=map_location,
            strict=strict,
            weights_only=weights_only,
            **kwargs,
        )
    namespace = _namespace_of(module_class)
    with open_checkpoint(path, None if tag is None else str(tag)) as checkpoint:
        content = from_checkpoint(
            checkpoint, namespace.version, weights_only, with_optimizers=False
        )
        handed_out = HandedOut(content)
        left_out = checkpoint.manifest.excluded
        build = partial(_build, namespace, module_class, content, checkpoint.path)
        module = _build_without(left_out, build, content, strict, kwargs)
        del content, build
        handed_out.read_kept(checkpoint)
    return module if map_location is None else module.to(map_location)


def _namespace_of(module_class: type[Any]) -> Namespace:
    for name in installed():
        if isinstance(module_class, type) and issubclass(module_class, load(name).lightning_module):
            return load(name)
    raise ConfigurationError(f"expected a LightningModule class, found {module_class!r}")


def _build_without(
    left_out: Sequence[str],
    build: Callable[[bool | None, dict[str, Any]], Module],
    content: Mapping[str, Any],
    strict: bool | None,
    kwargs: dict[str, Any],
) -> Module:
    """The module; frozen parameters that were `left_out` of the save keep the values that the class gives them."""
    if not left_out:
        return build(strict, kwargs)
    with (
        warnings.catch_warnings()
    ):  # Lightning warns of missing keys: of these, or of others that are refused below
        warnings.filterwarnings("ignore", message="Found keys that are in the model state dict")
        module = build(False, kwargs)
    if module.strict_loading if strict is None else strict:
        live = module.state_dict()
        own = {key: live[key] for key in left_out if key in live}
        module.load_state_dict({**content["state_dict"], **own}, strict=True)
    return module


def _build(
    namespace: Namespace,
    module_class: type[Module],
    content: dict[str, Any],
    path: str,
    strict: bool | None,
    kwargs: dict[str, Any],
) -> Module:
    """The steps that `load_from_checkpoint` takes once its file is read."""
    migration = namespace.module("utilities.migration.utils")
    content = migration._pl_migrate_checkpoint(content, checkpoint_path=path)
    key = module_class.CHECKPOINT_HYPER_PARAMS_KEY
    content.setdefault(key, {}).update(kwargs)
    saving = namespace.module("core.saving")
    with _in_memory(module_class):
        module: Module = saving._load_state(module_class, content, strict=strict, **kwargs)
    return module


@contextmanager
def _in_memory(module_class: type[Any]) -> Iterator[None]:
    """Inside, what `configure_model` has made on the meta device gets memory and initial values before it loads."""
    own = vars(module_class).get("load_state_dict")
    load_state_dict = module_class.load_state_dict

    @wraps(load_state_dict)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        materialize(self, list(self.modules()), torch.device("cpu"))
        return load_state_dict(self, *args, **kwargs)

    module_class.load_state_dict = load
    try:
        yield
    finally:
        if own is None:
            del module_class.load_state_dict
        else:
            module_class.load_state_dict = own
