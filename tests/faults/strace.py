"""strace, attached by a process to itself: it records the system calls on files of a folder, or kills at one of them.

Attaching costs far less than starting Python under strace.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    *("openat", "fallocate", "ftruncate", "pwrite64", "write", "fsync", "fdatasync", "close"),
    *("mkdir", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"),
)
"""What touches files in a save; strace passes over those that an architecture lacks."""

_LINE = re.compile(r"(\d+) +(\w+)\((.*)")


@dataclass(frozen=True, order=True)
class Call:
    """A thread's `number`-th call of this name on `path`, relative to the folder, the first being 1."""

    name: str
    path: str
    number: int


def record(log: str) -> str:
    """Log the calls of this process from now on. Why that is impossible here, or ""."""
    return _attach("-y", "-o", log, "-e", "trace=" + ",".join(f"?{name}" for name in NAMES))


def kill_at(call: Call, folder: str) -> None:
    """SIGKILL to this process when a thread of it enters the call."""
    inject = f"inject={call.name}:signal=KILL:when={call.number}"
    path = os.path.normpath(os.path.join(folder, call.path))
    why_not = _attach("-o", os.devnull, "-P", path, "-e", f"trace={call.name}", "-e", inject)
    assert not why_not, why_not


def recorded(log: Path, folder: Path) -> list[Call]:
    """The calls in a log that name a path in the folder, by themselves or by what is open."""
    path_in = re.compile(rf'["<]{re.escape(str(folder))}/?([^">]*)[">]')
    counts: Counter[tuple[str, str, str]] = Counter()
    calls = set()
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match and (found := path_in.search(match[3])):
            thread, name, path = match[1], match[2], found[1]
            counts[thread, name, path] += 1
            calls.add(Call(name, path, counts[thread, name, path]))
    return sorted(calls)


_tracers: list[subprocess.Popen[str]] = []  # each ends with the process that it traces


def _attach(*options: str) -> str:
    if shutil.which("strace") is None:
        return "strace is not installed"
    command = ["strace", "-f", "-qq", *options, "-p", str(os.getpid())]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _tracers.append(tracer)
    deadline = time.monotonic() + 20
    while not _traced():
        if tracer.poll() is not None or time.monotonic() > deadline:
            tracer.kill()
            return f"strace cannot attach: {tracer.communicate()[1].strip()}"
        time.sleep(0.002)
    return ""


def _traced() -> bool:
    """Whether every thread is."""
    for path in Path("/proc/self/task").glob("*/status"):
        with suppress(OSError):  # of a thread that has just ended
            if "TracerPid:\t0\n" in path.read_text():
                return False
    return True
