"""What a save gives back: where the checkpoint is, or will be, and whether it is there yet."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Committed", "SaveHandle", "Skipped"]


class SaveHandle:
    """A checkpoint that is saved, or is being saved.

    `path`, `tag`: its folder and name; when ranks asked for different ones, rank 0's as soon as they have met.
    `timings`: seconds of each phase on this rank, as far as it has come.
    """

    path: str
    tag: str
    timings: dict[str, float]

    @property
    def committed(self) -> bool:
        """Whether the checkpoint is there, whole and durable."""
        raise NotImplementedError

    @property
    def skipped(self) -> bool:
        """Whether nothing was saved, because an earlier save was still under way."""
        return False

    def __repr__(self) -> str:
        state = "committed" if self.committed else "skipped" if self.skipped else "not committed"
        return f"<save of {self.path}: {state}>"

    def staged(self) -> None:
        """Return when the live state has been copied, so that it may change. `optimizer.step()` calls it by itself."""
        raise NotImplementedError

    def wait(self) -> None:
        """Return when the checkpoint is committed, or raise what kept it from that: the same error on every rank."""
        raise NotImplementedError


@dataclass(slots=True, repr=False)
class Committed(SaveHandle):
    """A save that was committed when it returned."""

    path: str
    tag: str
    timings: dict[str, float]

    @property
    def committed(self) -> bool:
        return True

    def staged(self) -> None:
        pass

    def wait(self) -> None:
        pass


@dataclass(slots=True, repr=False)
class Skipped(SaveHandle):
    """No save: an earlier one was under way, and `when_busy` is "skip"."""

    path: str
    tag: str
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def committed(self) -> bool:
        return False

    @property
    def skipped(self) -> bool:
        return True

    def staged(self) -> None:
        pass

    def wait(self) -> None:
        pass
