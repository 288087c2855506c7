"""The memory that control groups leave this process: a container's limit is lower than its host's memory.

Linux's, version 1 and 2. A group's limit holds for all that is in it, so the nearest of those from this process's group
up to the root counts. Page cache that nobody uses counts as free, as the kernel takes it back first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["bytes_to_limit"]

_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_VERSION_2 = "memory.max", "memory.current", "inactive_file"


def bytes_to_limit(
    root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes that may still be taken; `sys.maxsize` where there is no limit."""
    free = sys.maxsize
    for folder, (limit, used, cached) in _groups(root, process):
        with suppress(OSError, ValueError, KeyError):  # no such file, or no limit: "max"
            most = int((folder / limit).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left = most - int((folder / used).read_text()) + int(stat[cached])
            free = min(free, max(0, left))
    return free


def _groups(root: Path, process: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's groups and of those around them, with the names of what they tell.

    In a container the path that the process is told may be that of the host, and the folder at `root` its own.
    """
    with suppress(OSError):
        for line in process.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                base, names = root / "memory", _VERSION_1
            elif not controllers:
                base, names = root, _VERSION_2
            else:
                continue
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder == base or base in folder.parents:
                    yield folder, names
