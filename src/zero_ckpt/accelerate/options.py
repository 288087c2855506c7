"""The options with which an accelerator is attached, and their checks."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from zero_ckpt.core.agreement import check_tag_validation
from zero_ckpt.core.arguments import (
    check_keep_last,
    check_sharding_options,
    check_timeout,
    check_zero_stage,
)
from zero_ckpt.core.async_save import AsyncSave, check_async_save
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32.layout import parse_size
from zero_ckpt.fp32.publishing import output_of
from zero_ckpt.fp32.selection import DTYPES
from zero_ckpt.zero import WrapPolicy
from zero_ckpt.zero.wrap import check_wrap

__all__ = ["Options"]

FORMATS = ("safetensors", "bin")
"""Formats of the export. Not Lightning's .ckpt, which takes more than an accelerator's checkpoint holds."""


@dataclass(frozen=True, slots=True)
class Options:
    """The keyword arguments of `attach` and `ZeroAccelerator`, which document them.

    Raises `ConfigurationError` for a wrong value now, and not when the training has ended and it is used.
    """

    stage: int | None = None
    wrap: WrapPolicy = "auto"
    sharding_size: int | None = None
    cpu_offload: bool = False
    export: str | os.PathLike[str] | bool = "auto"
    export_format: str = "safetensors"
    export_dtype: str = "fp32"
    max_shard_size: int | str | None = None
    tag_validation: str = "warn"
    keep_last: int | None = None
    timeout: float | None = None
    async_save: bool | AsyncSave = False

    def __post_init__(self) -> None:
        check_zero_stage(self.stage, "stage")
        check_sharding_options(self.stage, self.sharding_size, self.cpu_offload)
        check_wrap(self.wrap)
        self._check_export()
        check_tag_validation(self.tag_validation)
        check_keep_last(self.keep_last)
        check_timeout(self.timeout)
        check_async_save(self.async_save)

    def _check_export(self) -> None:
        if not isinstance(self.export, (str, os.PathLike, bool)) or self.export == "":
            raise ConfigurationError(f"export={self.export!r}: expected 'auto', a path, or False.")
        if self.export_format not in FORMATS:
            raise ConfigurationError(
                f"export_format={self.export_format!r}: expected one of {', '.join(FORMATS)}."
            )
        if self.export_dtype not in DTYPES:
            raise ConfigurationError(
                f"export_dtype={self.export_dtype!r}: expected one of {', '.join(DTYPES)}."
            )
        if self.max_shard_size is not None:
            parse_size(self.max_shard_size)
        if not isinstance(self.export, bool) and self.export != "auto":
            output_of(self.export, self.export_format)

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> Options:
        """Options from those keyword arguments that are ours, which are removed from `arguments`."""
        own = {field.name for field in fields(cls)} & arguments.keys()
        return cls(**{name: arguments.pop(name) for name in own})
