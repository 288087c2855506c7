"""Refuses saves of a process that was one of several ranks and has lost its process group.

Without the group every rank takes itself for the only one, and would write the same files as the others: whole copies
of what they have, or its own part alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zero_ckpt.core.state import is_partitioned
from zero_ckpt.errors import ConfigurationError

__all__ = ["check_all_save", "group_gone"]


def check_all_save(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Any], world_size: int
) -> None:
    """Raises `ConfigurationError` when one of these belongs to more ranks than the `world_size` that save."""
    for ranks, what in _spread(models, optimizers):
        if ranks > world_size:
            raise group_gone(what, ranks, world_size)


def group_gone(what: str, ranks: int, world_size: int) -> ConfigurationError:
    """The error for `what`, which belongs to `ranks` ranks, where only `world_size` of them would save."""
    return ConfigurationError(
        f"{what} belongs to {ranks} ranks, of which {world_size} would save: the process group is gone, or is not the "
        "one that saves, and each rank would write what the others write. Save before destroy_process_group(); a "
        "process that is to save alone needs a new Checkpointer, of a module without DistributedDataParallel and of an "
        "optimizer that is not sharded"
    )


def _spread(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Any]
) -> Iterable[tuple[int, str]]:
    """(ranks, what) of everything that holds on to a process group.

    DTensors are not looked at: `dtensors.local_part` checks the ranks of each when it is saved.
    """
    for name, model in models.items():
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                yield module.process_group.size(), f"model '{name}'" if name else "the model"
    for name, optimizer in optimizers.items():
        if is_partitioned(optimizer):
            ranks = getattr(optimizer, "world_size", 1)
            yield ranks, f"optimizer '{name}'" if name else "the optimizer"
