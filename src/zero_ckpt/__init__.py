"""ZeRO-sharded training checkpoints for Lightning, Accelerate and plain PyTorch.

    Checkpointer                        saves and loads a plain training loop's objects; AsyncSave: beside the training
    save_checkpoint, load_checkpoint    one save or load without it; they give a SaveHandle, a LoadResult
    export_fp32, get_fp32_state_dict_from_zero_checkpoint
                                        a checkpoint's weights as one full fp32 state dict, in files or in memory

    zero_ckpt.lightning                 the strategy, the CheckpointIO plugin, the export callback
    zero_ckpt.accelerate                attach: an Accelerator that saves and loads through this package
    zero_ckpt.zero                      ZeRO stages 1 to 3 for a loop of one's own, and experts on different ranks
    zero_ckpt.interop                   DeepSpeed's checkpoints, converted in and out
    zero_ckpt.errors                    every exception that is raised on purpose

Importing this package imports neither torch nor a framework: names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zero_ckpt.calls import load_checkpoint, save_checkpoint
    from zero_ckpt.checkpointer import Checkpointer
    from zero_ckpt.core.async_save import AsyncSave
    from zero_ckpt.core.handle import SaveHandle
    from zero_ckpt.core.outcome import LoadResult
    from zero_ckpt.fp32 import export_fp32, get_fp32_state_dict_from_zero_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "AsyncSave": "zero_ckpt.core.async_save",
    "Checkpointer": "zero_ckpt.checkpointer",
    "export_fp32": "zero_ckpt.fp32",
    "get_fp32_state_dict_from_zero_checkpoint": "zero_ckpt.fp32",
    "LoadResult": "zero_ckpt.core.outcome",
    "load_checkpoint": "zero_ckpt.calls",
    "SaveHandle": "zero_ckpt.core.handle",
    "save_checkpoint": "zero_ckpt.calls",
}

_PACKAGES = ("accelerate", "errors", "fp32", "interop", "lightning", "testing", "zero")

__all__ = [
    "AsyncSave",
    "Checkpointer",
    "LoadResult",
    "SaveHandle",
    "__version__",
    "export_fp32",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"zero_ckpt.{name}")
    raise AttributeError(f"module 'zero_ckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
