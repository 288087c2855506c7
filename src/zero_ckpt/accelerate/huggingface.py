"""The files that turn exported weights of a Hugging Face model into a folder that `from_pretrained` opens.

Knows such a model by its `config`, which can save itself; imports nothing of Hugging Face's.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from zero_ckpt.accelerate.base import prepared_model
from zero_ckpt.core.dtensors import TORCH_DTYPES
from zero_ckpt.core.places import AnyStorage, absolute, is_url
from zero_ckpt.fp32.publishing import output_of
from zero_ckpt.fp32.selection import DTYPES

__all__ = ["save_configuration"]


def save_configuration(model: nn.Module, path: str | os.PathLike[str], dtype: str) -> bool:
    """Write the model's configuration into the folder `path`, beside its weights. Returns whether it was written.

    It is not for a model that has none, or when `path` is a file. `dtype`: of the exported weights, as `export_fp32`
    takes it; the configuration states it, too.
    """
    inner: Any = prepared_model(model)
    folder = absolute(path)
    if not hasattr(getattr(inner, "config", None), "save_pretrained"):
        return False
    if output_of(folder, None).folder != folder:
        return False
    if not is_url(folder):
        _write(inner, folder, dtype)
        return True
    storage = AnyStorage()
    with TemporaryDirectory() as local_folder:
        _write(inner, local_folder, dtype)
        for name in os.listdir(local_folder):
            storage.put(f"{folder}/{name}", Path(local_folder, name).read_bytes())
    return True


def _write(inner: Any, folder: str, dtype: str) -> None:
    config: Any = copy.deepcopy(inner.config)
    written = DTYPES[dtype]
    if written is not None:
        name = "dtype" if hasattr(config, "dtype") else "torch_dtype"
        setattr(config, name, TORCH_DTYPES[written])
    config.architectures = [_class_name(inner)]
    config.save_pretrained(folder)
    generation: Any = getattr(inner, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        generation.save_pretrained(folder)


def _class_name(model: nn.Module) -> str:
    """The name of the model's own class; FSDP2 puts one of its own in front."""
    own = (kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    return next(own).__name__
