"""Rows of the result: medians side by side, their ratio, the goal, and the verdict.

Pure. A row never hides a sample: JSON holds all of them, the table the median and the range.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.ranks import Measured

MB = 10**6


@dataclass(frozen=True, slots=True)
class Goal:
    """What the judged number of a row must reach: `sign` is `>=` or `<=`."""

    sign: str
    value: float

    def met_by(self, number: float) -> bool:
        return number >= self.value if self.sign == ">=" else number <= self.value


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. `judged` is held against the goal: a ratio; MB where `unit` is MB; else seconds."""

    case: str
    what: str
    ours: tuple[float, ...]  # seconds or bytes, by round
    against: str
    theirs: tuple[float, ...]  # of the same unit; empty when there is nothing to compare with
    unit: str  # "s" or "MB"
    judged: float
    goal: Goal | None

    @property
    def judged_text(self) -> str:
        """A ratio, or seconds or MB where nothing is compared."""
        return f"{self.judged:.0f} MB" if self.unit == "MB" else f"{self.judged:.3g}{self._seconds}"

    @property
    def goal_text(self) -> str:
        if self.goal is None:
            return ""
        unit = " MB" if self.unit == "MB" else self._seconds
        return f"{self.goal.sign} {self.goal.value:g}{unit}"

    @property
    def _seconds(self) -> str:
        return "" if self.theirs else " s"

    def verdict(self, smoke: bool) -> str:
        if self.goal is None:
            return ""
        if smoke:
            return "not judged"
        return "ok" if self.goal.met_by(self.judged) else "MISSED"


def at_least(value: float) -> Goal:
    return Goal(">=", value)


def at_most(value: float) -> Goal:
    return Goal("<=", value)


def faster(
    case: str, what: str, measured: Measured, ours: str, theirs: str, goal: Goal | None = None
) -> Row:
    """How many times faster than `theirs`: median seconds over median seconds."""
    return _timed(case, what, measured, (ours, theirs), goal, invert=False)


def slowdown(
    case: str, what: str, measured: Measured, ours: str, theirs: str, goal: Goal | None = None
) -> Row:
    """How many times the seconds of `theirs`."""
    return _timed(case, what, measured, (ours, theirs), goal, invert=True)


def timed_alone(
    case: str, what: str, measured: Measured, ours: str, goal: Goal | None = None
) -> Row:
    """Seconds held against an absolute goal: the median is judged."""
    values = tuple(measured.samples[ours])
    return Row(case, what, values, "", (), "s", statistics.median(values), goal)


def bounded(
    case: str, what: str, measured: Measured, ours: str, theirs: str | None, megabytes: float | None
) -> Row:
    """Bytes held against an absolute ceiling: the worst sample is judged."""
    values = tuple(measured.samples[ours])
    return Row(
        case=case,
        what=what,
        ours=values,
        against=_label(measured, theirs) if theirs else "",
        theirs=tuple(measured.samples[theirs]) if theirs else (),
        unit="MB",
        judged=max(values) / MB,
        goal=at_most(megabytes) if megabytes else None,
    )


def _timed(
    case: str,
    what: str,
    measured: Measured,
    names: tuple[str, str],
    goal: Goal | None,
    *,
    invert: bool,
) -> Row:
    ours, theirs = (tuple(measured.samples[name]) for name in names)
    ratio = statistics.median(theirs) / statistics.median(ours)
    return Row(
        case=case,
        what=what,
        ours=ours,
        against=_label(measured, names[1]),
        theirs=theirs,
        unit="s",
        judged=1 / ratio if invert else ratio,
        goal=goal,
    )


def _label(measured: Measured, name: str) -> str:
    return measured.labels.get(name, name)


HEADINGS = ("case", "measured", "zero_ckpt", "against", "theirs", "ratio", "goal", "")


def render(rows: Sequence[Row], *, smoke: bool) -> str:
    """The table as text: median (fastest-slowest), one row per comparison."""
    cells = [HEADINGS, *_without_repeats([_cells(row, smoke) for row in rows])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADINGS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def as_json(rows: Sequence[Row], *, smoke: bool) -> list[dict[str, Any]]:
    return [
        {
            "case": row.case,
            "measured": row.what,
            "unit": "s" if row.unit == "s" else "bytes",
            "zero_ckpt": row.ours,
            "against": row.against,
            "theirs": row.theirs,
            "judged": row.judged,
            "goal": f"{row.goal.sign} {row.goal.value:g}" if row.goal else None,
            "verdict": row.verdict(smoke),
        }
        for row in rows
    ]


def _cells(row: Row, smoke: bool) -> tuple[str, ...]:
    return (
        row.case,
        row.what,
        figure(row.ours, row.unit),
        row.against,
        figure(row.theirs, row.unit) if row.theirs else "",
        row.judged_text,
        row.goal_text,
        row.verdict(smoke),
    )


def _without_repeats(lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Blanks what a row measures, and its own figure, where the row above says the same."""
    return [
        ("", "", "", *line[3:]) if i and line[:3] == lines[i - 1][:3] else line
        for i, line in enumerate(lines)
    ]


def figure(values: tuple[float, ...], unit: str) -> str:
    """Median and range, as a reader wants them."""
    middle, low, high = statistics.median(values), min(values), max(values)
    if unit == "MB":
        return f"{middle / MB:.0f} MB ({low / MB:.0f}-{high / MB:.0f})"
    return f"{middle:.3g} s ({low:.3g}-{high:.3g})"
