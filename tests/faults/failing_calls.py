"""System calls of the local storage that fail when they are told to: each call has a name by which it is found again.

A call is (function, path relative to the root, how often this came before). Threads may order calls differently from
run to run; these names stay.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zero_ckpt.core import local_storage as storage

_ON_FILES = {"close", "fsync", "ftruncate", "open", "posix_fallocate", "pwrite"}
_ON_NAMES = {"mkdir", "replace", "rmtree", "scandir", "statvfs", "unlink"}

_LEASE = re.compile(r"\.saving-[0-9a-f]+-\d+-\d+")
"""Named anew for each save."""

Call = tuple[str, str, int]

Fault = Callable[[Call, Any, tuple[Any, ...]], Any]
"""Gets the call, the function and its arguments; returns what the call shall return, or raises."""


def harmless(_: Call, function: Any, args: tuple[Any, ...]) -> Any:
    return function(*args)


class FailingCalls:
    """Stands in for the modules `os` and `shutil` in the storage. `seen`: the calls below `root`, in order."""

    def __init__(self, root: Path, fault: Fault) -> None:
        self._root, self._fault = str(root), fault
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._open: dict[int, str] = {}
        self.seen: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(shutil if name == "rmtree" else os, name)
        if name not in _ON_FILES | _ON_NAMES:
            return real

        def call(*args: Any) -> Any:
            target = self._open.get(args[0], "") if isinstance(args[0], int) else str(args[0])
            if not target.startswith(self._root):
                return real(*args)
            known = self._known(name, target)
            result = self._fault(known, real, args)
            if name == "open":
                self._open[result] = target
            return result

        return call

    def _known(self, name: str, target: str) -> Call:
        key = name, _LEASE.sub(".saving", os.path.relpath(target, self._root))
        with self._lock:
            self._counts[key] += 1
            known = (*key, self._counts[key])
            self.seen.append(known)
        return known


@contextmanager
def failing_calls(root: Path, fault: Fault = harmless) -> Iterator[FailingCalls]:
    """Watch, and let fail, every call of the local storage below `root`."""
    calls = FailingCalls(root, fault)
    modules: dict[str, Any] = {"os": storage.os, "shutil": storage.shutil}
    storage.os = storage.shutil = calls  # type: ignore[assignment]
    try:
        yield calls
    finally:
        storage.os, storage.shutil = modules["os"], modules["shutil"]
