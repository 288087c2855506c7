"""What a finetuning callback had unfrozen when the checkpoint was saved trains on after a resume.

Such a callback freezes its part of the model again whenever a run is set up. Lightning then gives the optimizers their
groups back, and leaves their parameters frozen: a run that resumes after the callback's epoch would go on without
training them, and say nothing.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.naming import dotted, naming_of

__all__ = ["unfreeze_as_saved"]


def unfreeze_as_saved(module: nn.Module, source: Checkpoint) -> None:
    """Make trainable what is frozen now and was not when `source` was saved, as Lightning's `make_trainable` does."""
    clean, frozen = naming_of(module).clean, set(source.manifest.frozen)
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            stored = source.resolve(clean(dotted(path) + name))
            if not parameter.requires_grad and stored is not None and stored not in frozen:
                parameter.requires_grad_(True)
                if isinstance(part, _BatchNorm):
                    part.track_running_stats = True
