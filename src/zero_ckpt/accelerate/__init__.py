"""Accelerate: one call, then `save_state`, `load_state` and `end_training` go through zero_ckpt.

    from zero_ckpt.accelerate import attach

    accelerator = attach(Accelerator(), stage=2)         # None keeps how Accelerate itself shards
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.save_state("out", client_state={"epoch": 3})
    client_state = accelerator.load_state("out")         # any world size, any stage, whoever wrote it
    accelerator.end_training()                           # with the fp32 export

`attach_trainer` does the same for a `transformers.Trainer`.
"""

from __future__ import annotations

from zero_ckpt.accelerate.attach import ZeroAccelerator, attach, detach
from zero_ckpt.accelerate.trainer import attach_trainer

__all__ = ["ZeroAccelerator", "attach", "attach_trainer", "detach"]
