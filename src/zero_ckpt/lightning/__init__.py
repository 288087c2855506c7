"""ZeRO training and sharded checkpoints in Lightning.

    import zero_ckpt.lightning

    trainer = L.Trainer(strategy="zero_ckpt_stage_3", devices=8)

Importing this package registers the strategies in `lightning` and in the standalone
`pytorch_lightning`, where they are installed. `ZeroStrategy` and `Fp32Export` are the strategy and
the export as classes, for `lightning`; for `pytorch_lightning` they are called
`StandaloneZeroStrategy` and `StandaloneFp32Export`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zero_ckpt.lightning.checkpoint_io import ZeroCheckpointIO
from zero_ckpt.lightning.export import make_export
from zero_ckpt.lightning.loading import load_module
from zero_ckpt.lightning.namespaces import installed
from zero_ckpt.lightning.registry import register
from zero_ckpt.lightning.strategy import make_strategy

if TYPE_CHECKING:
    from zero_ckpt.lightning.export import Fp32ExportMixin as Fp32Export
    from zero_ckpt.lightning.export import Fp32ExportMixin as StandaloneFp32Export
    from zero_ckpt.lightning.strategy import ZeroStrategyMixin as StandaloneZeroStrategy
    from zero_ckpt.lightning.strategy import ZeroStrategyMixin as ZeroStrategy

__all__ = [
    "Fp32Export",
    "StandaloneFp32Export",
    "StandaloneZeroStrategy",
    "ZeroCheckpointIO",
    "ZeroStrategy",
    "load_module",
    "make_export",
    "make_strategy",
]

_MADE = {
    "Fp32Export": (make_export, "lightning.pytorch"),
    "StandaloneFp32Export": (make_export, "pytorch_lightning"),
    "StandaloneZeroStrategy": (make_strategy, "pytorch_lightning"),
    "ZeroStrategy": (make_strategy, "lightning.pytorch"),
}


def __getattr__(name: str) -> Any:
    make, namespace = _MADE.get(name, (None, ""))
    if make is None:
        raise AttributeError(f"module 'zero_ckpt.lightning' has no attribute {name!r}")
    if namespace not in installed():
        package = namespace.partition(".")[0]
        raise ModuleNotFoundError(
            f"zero_ckpt.lightning.{name} needs {package}, which is not installed", name=package
        )
    return make(namespace)


register()
