"""A journal of what a save asks the operating system to do, and the disk as a power failure at any moment leaves it.

The rules are those of POSIX, at their worst: bytes of a file last once it was synced; a name that was made, replaced or
removed lasts once its folder was synced; until then each change may have reached the disk, or not, in any order, and a
write in parts, as sectors or pages. Only a rename is never seen half done.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zero_ckpt.core import local_storage as storage


@dataclass
class Inode:
    """A file: the bytes that last, and the changes since, each a whole new content."""

    durable: bytes = b""
    pending: list[bytes] = field(default_factory=list)

    @property
    def content(self) -> bytes:
        return self.pending[-1] if self.pending else self.durable

    def after_crash(self, dice: random.Random) -> bytes:
        """Each unit of 512 or 4096 bytes as it was before or after some of the changes, in any mixture."""
        states = [self.durable, *self.pending]
        older, newer = (states[i] for i in sorted(dice.choices(range(len(states)), k=2)))
        unit, nbytes = dice.choice((512, 4096)), len(dice.choice((older, newer)))
        units = (dice.choice((older, newer))[at : at + unit] for at in range(0, nbytes, unit))
        return b"".join(part.ljust(unit, b"\0") for part in units)[:nbytes]


Names = dict[str, "Inode | None"]
"""Path -> file, or None for a folder."""


@dataclass
class Disk:
    """Names that last, and the changes since: path -> what it names after the change, `GONE` for nothing."""

    durable: Names = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)

    GONE = object()

    def after_crash(self, dice: random.Random, root: str) -> dict[str, bytes | None]:
        """Everything that lasted, by path relative to `root`; None is a folder."""
        names: dict[str, Any] = dict(self.durable)
        for change in self.pending:
            if dice.random() < 0.5:
                names.update(change)
        present = {path: entry for path, entry in names.items() if entry is not self.GONE}
        return {
            os.path.relpath(path, root): None if entry is None else entry.after_crash(dice)
            for path, entry in present.items()
            if all(str(p) in present for p in Path(path).parents if str(p).startswith(root))
        }


class Journal:
    """Stands in for the modules `os` and `shutil` in the storage: does what it is asked, and keeps the book.

    `moments` holds, after every call that changed anything, the disk as it was then.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.disk = Disk()
        self.moments: list[Disk] = []
        self._open: dict[int, str] = {}
        self._lock = threading.RLock()
        self._names: Names = {}
        for path in [root, *sorted(root.rglob("*"))]:
            entry = Inode(path.read_bytes()) if path.is_file() else None
            self._names[str(path)] = self.disk.durable[str(path)] = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        with self._lock:
            fd = os.open(path, flags, mode)
            self._open[fd] = path
            if flags & os.O_CREAT and path not in self._names:
                self._change({path: Inode()})
            elif flags & os.O_TRUNC:
                self._write(path, b"")
            return fd

    def close(self, fd: int) -> None:
        with self._lock:
            self._open.pop(fd, None)
            os.close(fd)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        with self._lock:
            written = os.pwrite(fd, data, offset)
            old = self._content(fd)
            new = bytes(data[:written])
            self._write(
                self._open[fd], old[:offset].ljust(offset, b"\0") + new + old[offset + written :]
            )
            return written

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        with self._lock:
            os.posix_fallocate(fd, offset, length)
            self._write(self._open[fd], self._content(fd).ljust(offset + length, b"\0"))

    def ftruncate(self, fd: int, length: int) -> None:
        with self._lock:
            os.ftruncate(fd, length)
            self._write(self._open[fd], self._content(fd)[:length].ljust(length, b"\0"))

    def fsync(self, fd: int) -> None:
        with self._lock:
            os.fsync(fd)
            path = self._open[fd]
            entry = self._names.get(path)
            if entry is not None:
                entry.durable, entry.pending = entry.content, []
            else:
                self._sync_folder(path)
            self._snap()

    def replace(self, source: str, target: str) -> None:
        with self._lock:
            os.replace(source, target)
            self._change({target: self._names[source], source: Disk.GONE})

    def unlink(self, path: str) -> None:
        with self._lock:
            os.unlink(path)
            self._change({path: Disk.GONE})

    def mkdir(self, path: str) -> None:
        with self._lock:
            os.mkdir(path)
            self._change({path: None})

    def rmtree(self, path: str) -> None:
        with self._lock:
            for name in sorted(os.listdir(path)):
                self.unlink(os.path.join(path, name))
            shutil.rmtree(path)
            self._change({path: Disk.GONE})

    def _content(self, fd: int) -> bytes:
        entry = self._names[self._open[fd]]
        assert entry is not None
        return entry.content

    def _write(self, path: str, content: bytes) -> None:
        entry = self._names[path]
        assert entry is not None
        entry.pending.append(content)
        self._snap()

    def _change(self, change: dict[str, Any]) -> None:
        for path, entry in change.items():
            if entry is Disk.GONE:
                self._names.pop(path, None)
            else:
                self._names[path] = entry
        self.disk.pending.append(change)
        self._snap()

    def _sync_folder(self, folder: str) -> None:
        """The changes of names in `folder` last from now on."""
        waiting = []
        for change in self.disk.pending:
            if all(os.path.dirname(path) == folder for path in change):
                self.disk.durable.update(change)
            else:
                waiting.append(change)
        self.disk.pending = waiting

    def _snap(self) -> None:
        copies: dict[int, Inode] = {}

        def copied(entry: Any) -> Any:
            if not isinstance(entry, Inode):
                return entry
            if id(entry) not in copies:
                copies[id(entry)] = Inode(entry.durable, list(entry.pending))
            return copies[id(entry)]

        durable = {path: copied(entry) for path, entry in self.disk.durable.items()}
        pending = [{p: copied(e) for p, e in change.items()} for change in self.disk.pending]
        self.moments.append(Disk(durable, pending))


@contextmanager
def journaled(root: Path) -> Iterator[Journal]:
    """Keep the book of everything that the local storage does below `root`."""
    journal = Journal(root)
    modules: dict[str, Any] = {"os": storage.os, "shutil": storage.shutil}
    storage.os = storage.shutil = journal  # type: ignore[assignment]
    try:
        yield journal
    finally:
        storage.os, storage.shutil = modules["os"], modules["shutil"]


def restore(found: dict[str, bytes | None], folder: Path) -> None:
    """Write what lasted as real files."""
    for path in sorted(found):
        content = found[path]
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).write_bytes(content)
