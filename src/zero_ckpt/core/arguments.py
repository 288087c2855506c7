"""Checks of arguments that `Checkpointer`, `attach` and `ZeroStrategy` share. Imports no torch.

They are made when an argument is given, so that a training does not fail at its first save.
"""

from __future__ import annotations

import math

from zero_ckpt.errors import ConfigurationError

__all__ = [
    "check_keep_last",
    "check_sharding_options",
    "check_timeout",
    "check_zero_stage",
    "is_count",
]


def check_keep_last(value: object) -> None:
    """Raises `ConfigurationError` unless `value` is a number of checkpoints to keep, at least 1, or None."""
    if value is not None and not is_count(value):
        raise ConfigurationError(f"keep_last must be at least 1 or None, found {value!r}")


def check_timeout(value: object, name: str = "timeout") -> None:
    """Raises `ConfigurationError` unless `value` is a finite number of seconds above 0, or None."""
    if value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise ConfigurationError(
            f"{name}={value!r}: expected a number of seconds above 0, or None."
        )


def check_zero_stage(value: object, name: str = "zero_stage", *, or_none: bool = True) -> None:
    """Raises `ConfigurationError` unless `value` is a ZeRO stage, 0 to 3, or, with `or_none`, None."""
    if value is None and or_none:
        return
    if isinstance(value, bool) or value not in (0, 1, 2, 3):
        expected = "0, 1, 2, 3 or None" if or_none else "0, 1, 2 or 3"
        raise ConfigurationError(f"{name}={value!r}: expected {expected}.")


def check_sharding_options(stage: int | None, sharding_size: object, cpu_offload: bool) -> None:
    """Raises `ConfigurationError` for options of stages 2 and 3 that are given at another `stage`, or cannot work."""
    if stage not in (2, 3) and (cpu_offload or sharding_size is not None):
        raise ConfigurationError(
            f"cpu_offload and sharding_size are for stages 2 and 3, not for stage={stage}."
        )
    if sharding_size is not None and not is_count(sharding_size):
        raise ConfigurationError(
            f"sharding_size={sharding_size!r}: expected a divisor of the number of processes, or None."
        )


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1; True and False are no numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
