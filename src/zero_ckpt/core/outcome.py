"""What a load gives back: a path and the client state, as a tuple, with what did not match as an attribute."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zero_ckpt.core.restoring import Restoration

__all__ = ["LoadReport", "LoadResult", "log_report", "report_of"]

logger = logging.getLogger("zero_ckpt")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Names of model tensors that a load did not match, on this rank.

    `missing`: in the model and not in the checkpoint; they keep their live values. `unexpected`: in the checkpoint and
    not in the model. Both are empty after a strict load. `excluded`: frozen parameters that were left out of the save
    on purpose; they keep their live values, strict or not.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


class LoadResult(tuple[Any, ...]):
    """`path, client_state = result`: a tuple of two, with more as attributes.

    `path`: the tag's folder; None when there was nothing to load and that was allowed. `client_state`: what was given
    to the save. `per_rank_client_state`: what this rank gave to the save; None at another world size. `report`: what
    did not match.
    """

    per_rank_client_state: Any
    report: LoadReport

    def __new__(
        cls,
        path: str | None,
        client_state: Any,
        per_rank_client_state: Any = None,
        report: LoadReport | None = None,
    ) -> LoadResult:
        self = super().__new__(cls, (path, client_state))
        self.per_rank_client_state = per_rank_client_state
        self.report = report or LoadReport()
        return self

    @property
    def path(self) -> Any:
        """The tag's folder, or None."""
        return self[0]

    @property
    def client_state(self) -> Any:
        """What rank 0 gave to the save, or None."""
        return self[1]

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self[0], self[1], self.per_rank_client_state, self.report)


def report_of(plan: Restoration) -> LoadReport:
    return LoadReport(tuple(plan.missing), tuple(plan.unexpected), tuple(plan.excluded))


def log_report(report: LoadReport, path: str, rank: int) -> None:
    """Tell, on the logger `zero_ckpt`, what a load that was not strict has left out: once for the job, by rank 0.

    Where ranks hold different tensors, what the others' loads left out is in their own `report`.
    """
    if rank != 0:
        return
    if report.missing:
        logger.warning("%s: not in the checkpoint, kept as it was: %s", path, _few(report.missing))
    if report.unexpected:
        logger.warning("%s: not in the model, not loaded: %s", path, _few(report.unexpected))


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
