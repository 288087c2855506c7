"""The two installable copies of Lightning, and what we need of each.

`lightning.pytorch` and the standalone `pytorch_lightning` are separate packages with separate base
classes and registries: an object made for one is foreign to the other. All names that we take from
either are taken here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["Namespace", "checkpoint_io_bases", "installed", "load"]

_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


@dataclass(frozen=True, slots=True)
class Namespace:
    """Classes of one copy; `name` is its import name."""

    name: str
    ddp_strategy: type[Any]
    lightning_module: type[Any]
    callback: type[Any]
    checkpoint_io: type[Any]
    torch_checkpoint_io: type[Any]
    wrapping_checkpoint_io: type[Any]
    mixed_precision: type[Any]
    half_precision: type[Any]
    double_precision: type[Any]
    registry: Any
    version: str

    def module(self, path: str) -> ModuleType:
        """A submodule of this copy, for example `callbacks`."""
        return import_module(f"{self.name}.{path}")

    def made(self, name: str, mixin: type[Any], base: type[Any]) -> type[Any]:
        """The public class `name` for this copy: `mixin` in front of the copy's own `base`."""
        public = name if self.name == "lightning.pytorch" else f"Standalone{name}"
        body = {
            "__doc__": mixin.__doc__,
            "__module__": "zero_ckpt.lightning",  # where it is found again when unpickled
            "__qualname__": public,
            "namespace": self,
        }
        return type(public, (mixin, base), body)


def installed() -> tuple[str, ...]:
    """Import names of the copies that are installed, without importing them."""
    return tuple(name for name in _FABRIC if _is_installed(name))


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


@cache
def load(name: str) -> Namespace:
    """Import the copy called `name`."""
    root = import_module(name)
    strategies = import_module(f"{name}.strategies")
    plugins = import_module(f"{name}.plugins")
    return Namespace(
        name=name,
        ddp_strategy=strategies.DDPStrategy,
        lightning_module=root.LightningModule,
        callback=root.Callback,
        checkpoint_io=plugins.CheckpointIO,
        torch_checkpoint_io=plugins.TorchCheckpointIO,
        wrapping_checkpoint_io=import_module(f"{name}.plugins.io.wrapper")._WrappingCheckpointIO,
        mixed_precision=plugins.MixedPrecision,
        half_precision=plugins.HalfPrecision,
        double_precision=plugins.DoublePrecision,
        registry=strategies.StrategyRegistry,
        version=str(root.__version__),
    )


def checkpoint_io_bases() -> tuple[type[Any], ...]:
    """The `CheckpointIO` classes of all installed copies. A subclass of all of them is accepted by each copy."""
    return tuple(load(name).checkpoint_io for name in installed())
