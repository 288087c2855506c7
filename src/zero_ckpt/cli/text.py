"""Numbers, times and tables as people read them. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

__all__ = [
    "age_text",
    "count_text",
    "duration_text",
    "iso_time",
    "json_text",
    "listing",
    "local_time",
    "placement_text",
    "plural",
    "printable",
    "ranks_text",
    "size_text",
    "table",
]


def size_text(nbytes: float) -> str:
    """Bytes in decimal units: `0 B`, `999 B`, `4.1 kB`, `12.0 GB`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        nbytes /= 1000
        if nbytes < 999.95:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1000:.1f} PB"


def count_text(number: int) -> str:
    """`950`, `12.3 k`, `250.1 M`, `70.6 G`."""
    return size_text(number).removesuffix("B").rstrip()


def duration_text(seconds: float) -> str:
    """`3 ms`, `0.25 s`, `12.3 s`, `310 s`."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.{2 if seconds < 9.995 else 1 if seconds < 99.95 else 0}f} s"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def age_text(created: float, now: float | None = None) -> str:
    """Seconds since the epoch as `5 min ago`; as a date when it is long ago or in the future."""
    age = (time.time() if now is None else now) - created
    if -5 < age < 5:
        return "just now"
    for unit, seconds, limit in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 24), ("d", 86400, 60)):
        if 0 < age < seconds * limit:
            return f"{int(age / seconds)} {unit} ago"
    return local_time(created)[:10]


def local_time(created: float) -> str:
    return _moment(created).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def iso_time(created: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC: `2026-01-31T12:00:00.000Z`."""
    return _moment(created).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _moment(created: float) -> datetime:
    """A time in UTC; the epoch for a number that no calendar has, as a broken clock may have written."""
    try:
        return datetime.fromtimestamp(created, timezone.utc)
    except (OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(0, timezone.utc)


def listing(items: Sequence[str], limit: int | None) -> str:
    """Joined by commas; of more than `limit` (None: any number) the first ones and how many more there are."""
    if limit is None or len(items) <= limit:
        return ", ".join(items)
    return f"{', '.join(items[:limit])} and {len(items) - limit} more"


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would act on: names come from files that anyone may have made."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def ranks_text(ranks: Collection[int]) -> str:
    """`0`, `0-7`, `0,2,5`, `0-3,8-11`; the number of them when that would be long."""
    parts: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    if len(parts) > 4:
        return f"{len(set(ranks))} of {min(ranks)}-{max(ranks)}"
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> list[str]:
    """Aligned lines, two spaces between columns. `right`: the headings of right-aligned columns, joined by spaces."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    to_right = [title in right.split() for title in header]
    return [
        "  ".join(
            cell.rjust(width) if flag else cell.ljust(width)
            for cell, width, flag in zip(line, widths, to_right, strict=True)
        ).rstrip()
        for line in lines
    ]


def json_text(value: Any) -> str:
    """Indented, in ASCII: nothing in it can act on a terminal."""
    return json.dumps(value, indent=2)


def placement_text(placement: str) -> str:
    """A placement of the manifest (`R`, `S0`, `T1`) as DTensor spells it."""
    kind, dim = printable(placement[:1]), printable(placement[1:])
    return {"R": "Replicate", "S": f"Shard({dim})", "T": f"StridedShard({dim})"}.get(kind, kind)
