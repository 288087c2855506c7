"""What a failed meeting means for the checkpoint or the model, in words that are the same on every rank."""

from __future__ import annotations

from zero_ckpt.errors import RankTimeoutError, SaveError, ZeroCkptError, describe

__all__ = ["TORN", "consequence", "lost_error", "shared_error"]

TORN = "LIVE TENSORS MAY BE OVERWRITTEN IN PART: load again, or load another checkpoint, before you train on."
"""How the error of a load ends that failed in its last step."""


def lost_error(phase: str, what: str, *, outcome_unknown: bool = False) -> RankTimeoutError:
    """The error for a meeting that lost ranks. `what`: which, and how; `outcome_unknown`: see `RankTimeoutError`."""
    error = RankTimeoutError(
        f"{phase}: {what}. Every rank must make this call and stay until it ends: look at the logs of all ranks. "
        f"{consequence(phase, outcome_unknown)}".rstrip()
    )
    error.outcome_unknown = outcome_unknown
    return error


def consequence(phase: str, outcome_unknown: bool = False) -> str:
    """What a failed meeting means for the checkpoint or the model."""
    if phase == "save: vote" and outcome_unknown:
        return "Whether it was committed is not known here: 'zero-ckpt ls' tells. Earlier checkpoints are intact."
    if phase.startswith("save"):
        return "Nothing was committed; earlier checkpoints are intact."
    if phase == "load: done":
        return TORN
    return "Nothing was loaded." if phase.startswith("load") else ""


def shared_error(phase: str, error: BaseException) -> ZeroCkptError:
    """The error as every rank gets it."""
    if isinstance(error, ZeroCkptError):
        return error
    kind = SaveError if phase.startswith("save") else ZeroCkptError
    return kind(f"{phase}: rank 0: {describe(error)}. {consequence(phase)}".rstrip())
