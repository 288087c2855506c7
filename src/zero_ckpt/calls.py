"""One save or one load without a `Checkpointer`: DeepSpeed's two calls as functions."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from zero_ckpt.checkpointer import Checkpointer
from zero_ckpt.core.binding import OneOrMany
from zero_ckpt.core.custom import CustomLoad
from zero_ckpt.core.handle import SaveHandle
from zero_ckpt.core.outcome import LoadResult
from zero_ckpt.errors import ConfigurationError

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    save_dir: str | os.PathLike[str],
    model: OneOrMany[nn.Module],
    optimizer: OneOrMany[torch.optim.Optimizer] | None = None,
    lr_scheduler: OneOrMany[Any] | None = None,
    *,
    tag: str | int | None = None,
    step: int | None = None,
    client_state: Any = None,
    per_rank_client_state: Any = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
    tag_validation: str = "warn",
) -> SaveHandle:
    """One save without a `Checkpointer`: collective, committed and durable on return.

    Arguments, the result and errors are those of its constructor and of its `save_checkpoint`. Steps are not counted
    here, so `tag` or `step` must be given, else `ConfigurationError` is raised; with `tag` alone the step is 0.
    """
    if tag is None and step is None:
        raise ConfigurationError(
            "save_checkpoint needs tag= or step=; a Checkpointer counts steps by itself"
        )
    with Checkpointer(model, optimizer, lr_scheduler, tag_validation=tag_validation) as one:
        return one.save_checkpoint(
            save_dir,
            tag,
            client_state,
            save_latest,
            exclude_frozen_parameters,
            step=step or 0,
            per_rank_client_state=per_rank_client_state,
        )


def load_checkpoint(
    load_dir: str | os.PathLike[str],
    model: OneOrMany[nn.Module],
    optimizer: OneOrMany[torch.optim.Optimizer] | None = None,
    lr_scheduler: OneOrMany[Any] | None = None,
    *,
    tag: str | int | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: CustomLoad | None = None,
    override_hyperparameters: bool = False,
    missing_ok: bool = True,
    weights_only: bool = True,
    verify_first: bool = True,
) -> LoadResult:
    """One load without a `Checkpointer`: collective, all or nothing. Returns `path, client_state`, as a `LoadResult`.

    Arguments and errors are those of its constructor and of its `load_checkpoint`. One default differs, for the sake of
    scripts written for DeepSpeed: where nothing was ever saved (no such directory or tag) this warns and returns
    `(None, None)`, unless `missing_ok=False`. A checkpoint that is damaged, or that is gone, raises.
    """
    with Checkpointer(model, optimizer, lr_scheduler) as one:
        return one.load_checkpoint(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
            override_hyperparameters=override_hyperparameters,
            missing_ok=missing_ok,
            weights_only=weights_only,
            verify_first=verify_first,
        )
