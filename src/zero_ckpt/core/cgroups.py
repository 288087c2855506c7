"""How much memory Linux control groups leave to this process: a container's limit is lower than its host's memory.

Reads versions 1 and 2. A limit holds for everything in its group, so of the limits from this process's own group up to
the root the one that leaves least counts. Page cache that nobody uses counts as free: the kernel takes it back first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["bytes_to_limit"]

# The files that hold limit and usage in bytes, and the field of `memory.stat` that counts unused page cache.
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
    """The folders of this process's groups and of those around them, each with its names for limit, usage and cache.

    In a container `process` may name the path as the host sees it, which does not exist under `root`; the container's
    own group is then `root` itself.
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
