"""One picture of a run: how far each judged figure is from its goal. matplotlib is needed only here.

Every bar is the figure over its goal, or the goal over the figure where less is better: right of 1 the
goal is met. Figures and goals themselves stand beside the bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.table import Row

MET, MISSED, INK, MUTED = "#2a7f62", "#c0432f", "#222222", "#8a8a8a"
ROW_INCHES, LONGEST = 0.34, 20.0


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(rows: Sequence[Row], file: Path, subtitle: str, *, smoke: bool = False) -> None:
    """Writes a PNG of the rows that have a goal, in the order of the table; those of a smoke run are not judged."""
    from matplotlib.figure import Figure

    judged = [row for row in rows if row.goal is not None]
    figure = Figure(figsize=(11, 1.5 + ROW_INCHES * len(judged)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(judged):
        _draw(axes, place, row, color_of(row, smoke=smoke))
    _furnish(axes, judged)
    figure.suptitle("zero_ckpt against its goals", x=0.01, ha="left", size=13, weight="bold")
    told = "Sizes too small to judge" if smoke else "Bars right of the line: goal met"
    caption = f"{told}. {subtitle}"
    figure.supxlabel(caption, x=0.01, ha="left", size=8.5, color=MUTED)
    figure.savefig(file, dpi=150)


def margin(row: Row) -> float:
    """1 at the goal, more when it is surpassed."""
    assert row.goal is not None
    if row.goal.sign == ">=":
        return row.judged / row.goal.value
    return row.goal.value / max(row.judged, 1e-9)


def color_of(row: Row, *, smoke: bool) -> str:
    return {"ok": MET, "MISSED": MISSED}.get(row.verdict(smoke), MUTED)


def _draw(axes: Any, place: int, row: Row, color: str) -> None:
    found = min(max(margin(row), 1 / LONGEST), LONGEST)
    axes.barh(place, found - 1, left=1, color=color, height=0.62)
    side = {"ha": "left", "x": 5} if found >= 1 else {"ha": "right", "x": -5}
    axes.annotate(
        row.judged_text,
        (found, place),
        xytext=(side["x"], 0),
        textcoords="offset points",
        va="center",
        ha=side["ha"],
        size=8.5,
        color=color,
        weight="bold",
    )


def _furnish(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_xscale("log")
    low = min([0.5, *(margin(row) for row in rows)])
    high = max([2.0, *(min(margin(row), LONGEST) for row in rows)])
    axes.set_xlim(max(low, 1 / LONGEST) / 4, high * 2.5)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], size=8.5, color=INK)
    axes.invert_yaxis()
    axes.axvline(1, color=INK, linewidth=1)
    ticks = [t for t in (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20) if low / 2 <= t <= high * 2]
    axes.set_xticks(ticks, ["goal" if t == 1 else f"{t:g}x" for t in ticks], size=8.5)
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.grid(axis="x", color="#e6e6e6", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _label(row: Row) -> str:
    against = f" / {row.against}" if row.against and row.unit == "s" else ""
    return f"{row.what}{against}   ({row.goal_text})"
