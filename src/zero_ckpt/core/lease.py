"""One job at a time saves into a checkpoint directory. Imports no torch.

While a save runs, a file of its job lies in the directory, and what it holds changes every few seconds. A save that
finds the file of another job is refused, unless that job is dead: its process is gone from this host, or the file has
stayed as it is for `SILENCE`. Only changes count, as the waiting side sees them: clocks of different hosts do not
matter. Each side puts its file there before it looks for others, so of two that begin together at most one goes on.
Saves of one job do not know each other here.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from zero_ckpt.core.storage import Storage
from zero_ckpt.core.threads import start_thread
from zero_ckpt.core.watch import has_died, identity
from zero_ckpt.errors import SaveError

__all__ = ["PREFIX", "RENEWAL", "SILENCE", "Lease"]

PREFIX = ".saving-"
"""How the files' names begin. Then follow the job and a number."""

RENEWAL = 5.0
"""Seconds between two changes of a lease."""

SILENCE = 60.0
"""Seconds without a change after which the job of a lease counts as dead, where its process cannot be looked up."""

_REMEDY = (
    "Nothing was written; what that job has saved is intact. Give each job a directory of its own, or stop one of "
    "them."
)

_LOOK = 0.25
"""Seconds between two looks at another job's lease."""

_TRIES = 4
"""How often the first file is put again, when another job has removed it half-written."""

_LIMIT = 4096
"""Bytes. No lease is longer."""

_JOB = uuid.uuid4().hex[:12]
_numbers = itertools.count()


class Lease:
    """The lease of one save. Rank 0 acquires it; on other ranks it stays without effect."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._path = ""
        self._prefix = ""
        self._directory = ""
        self._since = ""
        self._renewals = 0
        self._renewed = 0.0  # when the last change began, as `time.monotonic` tells it
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, directory: str, waiting: Callable[[], None], remedy: str = _REMEDY) -> bool:
        """Hold `directory`, or raise `SaveError` naming the job that does, and `remedy`. Release it in both cases.

        Waits while another job may be dead, and calls `waiting` several times a second meanwhile. Returns whether one
        is taken for dead only because it was silent: should it wake up, it writes on where it stopped.
        """
        self._directory = directory
        self._prefix = _own_prefix()
        self._path = f"{directory}/{self._prefix}{next(_numbers)}"
        self._renewed = time.monotonic()
        self._since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        try:
            self._put_first()
        except OSError as error:
            error.filename = directory  # the user knows no other name
            raise
        thread = threading.Thread(
            target=self._renew_until_released, name="zero_ckpt-lease", daemon=True
        )
        start_thread(thread)
        self._thread = thread
        others = self._of_other_jobs()
        whole = [path for path in others if not path.endswith(".tmp")]
        silent = self._outlast(whole, waiting, remedy)
        for path in others:
            self._storage.remove(path)
        return silent

    def check(self) -> None:
        """Call it before the commit. Raises `SaveError` when another job took this one for dead and has taken over.

        Somebody who removes all that is in the directory removes the lease, too.
        """
        if self._read(self._path) is None or self._was_overtaken():
            raise SaveError(
                f"{self._directory}: what this job keeps there while it saves ({os.path.basename(self._path)}) was "
                f"removed: by somebody who removed files of this directory, or this job did not run for more than "
                f"{SILENCE:g} s, and another one that saves here has taken over. Nothing was committed. Save again, or "
                "give each job a directory of its own."
            )

    def release(self) -> None:
        """Let the next one in. May be called again; never raises."""
        if self._thread is None and not self._path:
            return
        self._released.set()
        if self._thread is not None:
            self._thread.join()  # or it might put the file back
        with suppress(OSError):
            self._storage.remove(self._path)
        self._thread, self._path = None, ""

    def _put_first(self) -> None:
        """Put the file, and again if another job that begins just now took the half-written one for a dead job's."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                return self._put()
        return self._put()

    def _put(self) -> None:
        holder = {
            "host": socket.gethostname(),
            "process": identity(),
            "since": self._since,
            "renewals": self._renewals,
        }
        self._storage.put(self._path, json.dumps(holder).encode())

    def _renew_until_released(self) -> None:
        while not self._released.wait(RENEWAL):
            self._renewals += 1
            with suppress(OSError):
                self._renew()

    def _renew(self) -> None:
        """Change the file, unless another job has removed it: what was taken over stays so."""
        begin = time.monotonic()
        if self._read(self._path) is None:
            return
        self._put()
        if self._was_overtaken():  # between the two, and the file is back
            self._storage.remove(self._path)
        else:
            self._renewed = begin

    def _was_overtaken(self) -> bool:
        """Whether another job is there that may have taken this one for dead: it was silent for so long."""
        is_late = time.monotonic() - self._renewed > SILENCE
        return is_late and bool(self._of_other_jobs())

    def _of_other_jobs(self) -> list[str]:
        return [
            f"{self._directory}/{entry.name}"
            for entry in self._storage.list(self._directory)
            if entry.name.startswith(PREFIX)
            and not entry.name.startswith(self._prefix)
            and not entry.is_dir
        ]

    def _outlast(self, paths: Iterable[str], waiting: Callable[[], None], remedy: str) -> bool:
        """Return when all other jobs are dead; the result is whether only its silence tells that of one of them."""
        found = {path: content for path in paths if (content := self._read(path)) is not None}
        unknown = {path: content for path, content in found.items() if not _is_dead(content)}
        begin = time.monotonic()
        while unknown and time.monotonic() - begin < SILENCE:
            for path, content in unknown.items():
                if self._read(path) != content:
                    raise _held(self._directory, path, content, remedy)
            waiting()
            time.sleep(_LOOK)
        return bool(unknown)

    def _read(self, path: str) -> bytes | None:
        """What a lease holds; None when it is gone."""
        try:
            return self._storage.get(path, _LIMIT)
        except FileNotFoundError:
            return None
        except ValueError:
            return b""  # longer than any of ours


def _own_prefix() -> str:
    """How the names of this job's files begin. The process is a part of it: a forked one is another job."""
    return f"{PREFIX}{_JOB}-{os.getpid()}-"


def _holder(content: bytes) -> dict[str, Any]:
    """Who holds a lease; empty when its file does not say so, as when it is damaged."""
    with suppress(ValueError):
        holder = json.loads(content)
        if isinstance(holder, dict):
            return holder
    return {}


def _process(content: bytes) -> list[Any]:
    """The `watch.identity` of the process that holds a lease; empty when its file has none."""
    match _holder(content).get("process"):
        case [str(boot), str(namespace), int(pid), str(started)]:
            return [boot, namespace, pid, started]
    return []


def _is_dead(content: bytes) -> bool:
    process = _process(content)
    return bool(process) and has_died(process)


def _held(directory: str, path: str, content: bytes, remedy: str) -> SaveError:
    holder, process = _holder(content), _process(content)
    return SaveError(
        f"{directory}: another job is saving here: process {process[2] if process else '?'} on host "
        f"'{holder.get('host', '?')}', since {holder.get('since', '?')} ({os.path.basename(path)}). {remedy}"
    )
