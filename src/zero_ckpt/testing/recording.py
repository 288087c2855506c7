"""A storage in memory that records what it was asked for, and knows what a power failure at any moment leaves.

    storage = RecordingStorage()
    ...                                              # save with it
    for moment in storage.moments:
        disk = RecordingStorage(moment.sample(random.Random(seed)))
        ...                                          # load from it: it must be the old or the new checkpoint

The rules are those of the protocol at their worst. Bytes of a file last once `finish` has returned; of each earlier
write any part may have arrived, in units of 512 or 4096 bytes. A name that was made or removed lasts once its folder
was synced; until then each such change may have arrived or not, in any order. `put` is all or nothing, and lasts when
it returns, but makes nothing else last. Imports no torch.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from zero_ckpt.core.memory import round_up
from zero_ckpt.core.storage import Entry, FileReader, FileWriter

__all__ = ["Inode", "Moment", "RecordingStorage"]

_UNITS = (512, 4096)


@dataclass(frozen=True, slots=True)
class Inode:
    """A file's bytes that last, and the writes since: (offset, data), in order."""

    durable: bytes = b""
    pending: tuple[tuple[int, bytes], ...] = ()

    @property
    def content(self) -> bytes:
        return _written(self.durable, self.pending)

    def states(self) -> Iterator[bytes]:
        """Every content that a power failure may leave, each write torn at the first or last 512 or 4096 bytes."""
        cuts = [{0, len(data), *_cuts(len(data))} for _, data in self.pending]
        for lengths in itertools.product(*cuts):
            parts = zip(self.pending, lengths, strict=True)
            yield _written(self.durable, [(at, data[:n]) for (at, data), n in parts])

    def sample(self, dice: random.Random) -> bytes:
        """One content that a power failure may leave; of each write any units may be missing."""
        parts = []
        for at, data in self.pending:
            unit = dice.choice(_UNITS)
            kept = [s for s in range(0, len(data), unit) if dice.random() < 0.5]
            parts += [(at + start, data[start : start + unit]) for start in kept]
        return _written(self.durable, parts)


def _cuts(nbytes: int) -> Iterator[int]:
    for unit in _UNITS:
        if unit < nbytes:
            yield from (unit, nbytes - unit)


def _written(
    content: bytes, writes: list[tuple[int, bytes]] | tuple[tuple[int, bytes], ...]
) -> bytes:
    data = bytearray(content)
    for at, piece in writes:
        data.extend(bytes(max(0, at + len(piece) - len(data))))
        data[at : at + len(piece)] = piece
    return bytes(data)


@dataclass(frozen=True, slots=True)
class Moment:
    """The storage after one operation. Names lead to `files`; a change to None is a removal."""

    operation: str
    names: Mapping[str, int]
    changes: tuple[tuple[str, int | None], ...]
    files: Mapping[int, Inode]

    def name_states(self) -> Iterator[dict[str, Inode]]:
        """Every set of names that a power failure may leave: any of the changes that were not synced."""
        for kept in itertools.product((False, True), repeat=len(self.changes)):
            yield self._named([c for c, keep in zip(self.changes, kept, strict=True) if keep])

    def sample(self, dice: random.Random) -> dict[str, bytes]:
        """What one power failure leaves."""
        found = self._named([change for change in self.changes if dice.random() < 0.5])
        return {path: inode.sample(dice) for path, inode in found.items()}

    def _named(self, changes: list[tuple[str, int | None]]) -> dict[str, Inode]:
        names: dict[str, int | None] = {**self.names, **dict(changes)}
        return {path: self.files[n] for path, n in names.items() if n is not None}


@dataclass(slots=True)
class _State:
    names: dict[str, int] = field(default_factory=dict)
    changes: list[tuple[str, int | None]] = field(default_factory=list)
    files: dict[int, Inode] = field(default_factory=dict)

    def visible(self) -> dict[str, int]:
        names: dict[str, int | None] = {**self.names, **dict(self.changes)}
        return {path: number for path, number in names.items() if number is not None}


class RecordingStorage:
    """A `Storage`; may be used from any thread. `files`: path -> content of what is there from the beginning.

    `moments` holds the storage after every operation that changed anything.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._state = _State()
        self.moments: list[Moment] = []
        for path, data in (files or {}).items():
            self._state.names[path] = self._new(Inode(data))

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> FileWriter:
        with self._lock:
            number = self._state.visible()[path] if shared else self._new(Inode())
            self._change(f"create {path}", (path, number))
        return _Writer(self, path, number)

    def open(self, path: str) -> FileReader:
        return _Reader(self._content(path))

    def put(self, path: str, data: bytes) -> None:
        """Between the two moments that this makes it has happened, or not."""
        with self._lock:
            number = self._new(Inode(data))
            self._change(f"put {path}", (path, number))
            self._state.changes = [c for c in self._state.changes if c[0] != path]
            self._state.names[path] = number
            self._snap(f"put {path}: done")

    def get(self, path: str, limit: int) -> bytes:
        data = self._content(path)
        if len(data) > limit:
            raise ValueError(f"it is {len(data)} bytes long, longer than the {limit} bytes")
        return data

    def list(self, path: str) -> list[Entry]:
        with self._lock:
            visible = self._state.visible()
            if path in visible:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            below = {p[len(path) + 1 :]: n for p, n in visible.items() if p.startswith(f"{path}/")}
            if not below:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            folders = {name.partition("/")[0] for name in below if "/" in name}
            entries = [Entry(name, True, 0) for name in folders]
            for name, number in below.items():
                if "/" not in name:
                    entries.append(Entry(name, False, len(self._state.files[number].content)))
            return sorted(entries, key=lambda entry: entry.name)

    def remove(self, path: str) -> None:
        with self._lock:
            for name in sorted(self._state.visible()):
                if name == path or name.startswith(f"{path}/"):
                    self._change(f"remove {name}", (name, None))

    def sync(self, path: str) -> None:
        with self._lock:
            waiting = []
            for name, number in self._state.changes:
                if os.path.dirname(name) != path:
                    waiting.append((name, number))
                elif number is None:
                    self._state.names.pop(name, None)
                else:
                    self._state.names[name] = number
            self._state.changes = waiting
            self._snap(f"sync {path}")

    def free_bytes(self, path: str) -> int | None:
        return None

    def append(self, path: str, number: int, offset: int, data: bytes) -> None:
        """A write that a power failure may undo or tear."""
        with self._lock:
            inode = self._state.files[number]
            pending = (*inode.pending, (offset, data))
            self._state.files[number] = replace(inode, pending=pending)
            self._snap(f"write {path}")

    def settle(self, path: str, number: int, nbytes: int) -> None:
        """The file lasts, with this length."""
        with self._lock:
            content = self._state.files[number].content[:nbytes].ljust(nbytes, b"\0")
            self._state.files[number] = Inode(content)
            self._snap(f"finish {path}")

    def _content(self, path: str) -> bytes:
        with self._lock:
            number = self._state.visible().get(path)
            if number is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return self._state.files[number].content

    def _new(self, inode: Inode) -> int:
        number = next(self._numbers)
        self._state.files[number] = inode
        return number

    def _change(self, operation: str, change: tuple[str, int | None]) -> None:
        self._state.changes.append(change)
        self._snap(operation)

    def _snap(self, operation: str) -> None:
        state = self._state
        moment = Moment(operation, dict(state.names), tuple(state.changes), dict(state.files))
        self.moments.append(moment)


class _Writer:
    def __init__(self, storage: RecordingStorage, path: str, number: int) -> None:
        self._storage, self._path, self._number = storage, path, number

    def write(self, offset: int, data: memoryview) -> None:
        self._storage.append(self._path, self._number, offset, bytes(data))

    def finish(self, nbytes: int) -> None:
        self._storage.settle(self._path, self._number, nbytes)

    def abort(self) -> None:
        self._storage.remove(self._path)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)

    def expect(self, offset: int, nbytes: int, keep: bool = False) -> int:
        return round_up(nbytes)

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        if offset + nbytes > self.nbytes:
            raise EOFError(f"the file ends at byte {self.nbytes}")
        buffer[:nbytes] = self._data[offset : offset + nbytes]

    def close(self) -> None:
        """Nothing is open."""
