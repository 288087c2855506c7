"""ZeRO training and sharded checkpoints in Lightning.

    import zero_ckpt.lightning

    trainer = L.Trainer(strategy="zero_ckpt_stage_3", devices=8)

Importing this package registers the strategies in `lightning` and in the standalone
`pytorch_lightning`, where they are installed. `ZeroStrategy` is the strategy as a class, for
`lightning`; `StandaloneZeroStrategy` is the one for `pytorch_lightning`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zero_ckpt.lightning.checkpoint_io import ZeroCheckpointIO
from zero_ckpt.lightning.namespaces import installed
from zero_ckpt.lightning.registry import register
from zero_ckpt.lightning.strategy import make_strategy

if TYPE_CHECKING:
    from zero_ckpt.lightning.strategy import ZeroStrategyMixin as StandaloneZeroStrategy
    from zero_ckpt.lightning.strategy import ZeroStrategyMixin as ZeroStrategy

__all__ = ["StandaloneZeroStrategy", "ZeroCheckpointIO", "ZeroStrategy", "make_strategy"]

_STRATEGIES = {
    "ZeroStrategy": "lightning.pytorch",
    "StandaloneZeroStrategy": "pytorch_lightning",
}


def __getattr__(name: str) -> Any:
    if name in _STRATEGIES and _STRATEGIES[name] in installed():
        return make_strategy(_STRATEGIES[name])
    raise AttributeError(f"module 'zero_ckpt.lightning' has no attribute {name!r}")


register()
