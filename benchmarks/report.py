"""`python -m benchmarks.report FILE... [--plot PNG]`: results of several runs as one Markdown table, and one picture.

A full run takes half an hour; runs of some cases each are joined here. Where two hold the same row the
later file counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.plot import plot
from benchmarks.table import Goal, Row, figure

HEADINGS = ("case", "measured", "zero_ckpt", "against", "theirs", "ratio", "goal", "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    options = parser.parse_args()
    results = [json.loads(file.read_text()) for file in options.files]
    rows = list(joined(results))
    smoke = any(result["options"]["smoke"] for result in results)
    print(markdown(rows, smoke=smoke))
    print(f"\n{machine_text(results[-1]['machine'])}")
    if options.plot:
        plot(rows, options.plot, machine_text(results[-1]["machine"]), smoke=smoke)


def joined(results: Iterable[dict[str, Any]]) -> Iterable[Row]:
    found = {
        (record["case"], record["measured"], record["against"]): _row(record)
        for result in results
        for record in result["rows"]
    }
    return found.values()


def _row(record: dict[str, Any]) -> Row:
    sign, _, value = (record["goal"] or "").partition(" ")
    return Row(
        case=record["case"],
        what=record["measured"],
        ours=tuple(record["zero_ckpt"]),
        against=record["against"],
        theirs=tuple(record["theirs"]),
        unit="s" if record["unit"] == "s" else "MB",
        judged=record["judged"],
        goal=Goal(sign, float(value)) if sign else None,
    )


def machine_text(machine: dict[str, Any]) -> str:
    """Date, processor, disk and versions: what a figure means nothing without."""
    gigabytes = machine["memory_bytes"] / 2**30
    torch = machine["versions"]["torch"]
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, {gigabytes:.0f} GiB, {machine['disk']}, "
        f"{machine['gpu'] or 'no GPU'}, Python {machine['python']}, torch {torch}"
    )


def markdown(rows: Iterable[Row], *, smoke: bool) -> str:
    """`smoke`: some are of sizes too small to judge, so none is judged."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(row, smoke) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row, smoke: bool) -> tuple[str, ...]:
    theirs = figure(row.theirs, row.unit) if row.theirs else ""
    verdict = row.verdict(smoke).replace("ok", "met").lower()
    ours = figure(row.ours, row.unit)
    return row.case, row.what, ours, row.against, theirs, row.judged_text, row.goal_text, verdict


if __name__ == "__main__":
    main()
