"""How saves run beside the training: what a user may choose, and what cannot work. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.errors import ConfigurationError

__all__ = ["AsyncSave", "async_save_of", "check_async_save"]

WHEN_BUSY = ("wait", "skip", "replace")


@dataclass(frozen=True, slots=True)
class AsyncSave:
    """How saves run beside the training. Raises `ConfigurationError` for values that cannot work.

    staging_bytes: host memory of this rank for copies of its state, at least 24 MiB. None: as much as it writes, at
        most a quarter of what is free when it is first needed, shared by the ranks of this host. A larger state is
        staged in pieces, and the next optimizer step waits for the disk to take what has no room.
    when_busy: what a save does while `max_in_flight` earlier ones are under way: "wait" for the oldest, "skip" this
        one, or "replace" those by this one.
    max_in_flight: saves under way at a time, at least 1.
    check_staging: checksum all weights and optimizer state when the save begins, and once more when they are staged:
        finds code that changes them in ways that leave no other trace (`tensor.data`). For debugging: the save call
        waits for the checksums.
    grace: seconds that SIGTERM waits for a commit before it ends the process.
    """

    staging_bytes: int | None = None
    when_busy: str = "wait"
    max_in_flight: int = 1
    check_staging: bool = False
    grace: float = 30.0

    def __post_init__(self) -> None:
        if self.when_busy not in WHEN_BUSY:
            raise ConfigurationError(
                f"when_busy={self.when_busy!r}: expected one of {', '.join(WHEN_BUSY)}."
            )
        if self.max_in_flight < 1:
            raise ConfigurationError(f"max_in_flight={self.max_in_flight}: expected at least 1.")
        if self.grace < 0:
            raise ConfigurationError(f"grace={self.grace}: expected at least 0 seconds.")
        if self.staging_bytes is not None and self.staging_bytes < 6 * BLOCK:
            raise ConfigurationError(
                f"staging_bytes={self.staging_bytes}: expected at least {6 * BLOCK}, or None."
            )


def check_async_save(async_save: object) -> None:
    """Raise `ConfigurationError` for what the argument `async_save` of a strategy or an accelerator cannot be."""
    if not isinstance(async_save, (bool, AsyncSave)):
        raise ConfigurationError(
            f"async_save={async_save!r}: expected True, False or an AsyncSave."
        )


def async_save_of(engine: str | AsyncSave) -> bool | AsyncSave:
    """The `async_save` of `make_engine` that the argument `engine` of `Checkpointer` stands for.

    Raises `ConfigurationError` for an unknown name.
    """
    if isinstance(engine, AsyncSave) or engine in ("sync", "async"):
        return engine if isinstance(engine, AsyncSave) else engine == "async"
    raise ConfigurationError(f"engine={engine!r}: expected 'sync', 'async' or an AsyncSave.")
