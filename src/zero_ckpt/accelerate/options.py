"""What a user may say when an accelerator is attached."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from zero_ckpt.core.agreement import check_tag_validation
from zero_ckpt.core.decoupled import AsyncSave
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32.publishing import FORMATS
from zero_ckpt.fp32.selection import DTYPES
from zero_ckpt.zero import WrapPolicy

__all__ = ["Options"]


@dataclass(frozen=True, slots=True)
class Options:
    """The keyword arguments of `attach` and `ZeroAccelerator`, which document them."""

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
        if self.stage not in (None, 0, 1, 2, 3):
            raise ConfigurationError(f"stage={self.stage!r}: expected None, 0, 1, 2 or 3.")
        if self.stage not in (2, 3) and (self.cpu_offload or self.sharding_size is not None):
            raise ConfigurationError(
                f"cpu_offload and sharding_size are for stages 2 and 3, not for stage={self.stage}."
            )
        if self.export_format not in FORMATS:
            raise ConfigurationError(
                f"export_format={self.export_format!r}: expected one of {', '.join(FORMATS)}."
            )
        if self.export_dtype not in DTYPES:
            raise ConfigurationError(
                f"export_dtype={self.export_dtype!r}: expected one of {', '.join(DTYPES)}."
            )
        if self.keep_last is not None and self.keep_last < 1:
            raise ConfigurationError(
                f"keep_last must be at least 1 or None, found {self.keep_last}"
            )
        check_tag_validation(self.tag_validation)

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> Options:
        """Made of those keyword arguments that are ours, which are removed from `arguments`."""
        own = {field.name for field in fields(cls)} & arguments.keys()
        return cls(**{name: arguments.pop(name) for name in own})
