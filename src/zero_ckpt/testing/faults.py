"""A storage that goes wrong at a chosen operation: with an error, a delay, or the death of its process.

Wraps any `Storage`, counts its operations, and calls a function before each one. What the function raises is what the
operation raises; the operation itself then never happens. Imports no torch.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zero_ckpt.core.memory import ALIGNMENT
from zero_ckpt.core.storage import Entry, FileReader, FileWriter, Storage

__all__ = [
    "OPERATIONS",
    "FaultyStorage",
    "Operation",
    "delay_at",
    "fail_at",
    "fail_from",
    "kill_at",
    "short_at",
]

OPERATIONS = frozenset(
    ["create", "write", "finish", "open", "read", "put", "get", "list", "remove", "sync", "free"]
)
"""The operations that are counted. `write` and `finish` are those of a file being written, `read` of one being read."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that is about to happen. `number` counts from 0 among those that the storage watches."""

    number: int
    name: str
    path: str


Hook = Callable[[Operation], None]


def fail_at(number: int, code: int) -> Hook:
    """Operation `number` raises an OSError with `code`, one of the numbers in `errno`."""
    return _fail(lambda operation: operation.number == number, code)


def fail_from(number: int, code: int) -> Hook:
    """Operation `number` and all that follow raise an OSError with `code`."""
    return _fail(lambda operation: operation.number >= number, code)


def _fail(chosen: Callable[[Operation], bool], code: int) -> Hook:
    def hook(operation: Operation) -> None:
        if chosen(operation):
            raise OSError(code, os.strerror(code), operation.path)

    return hook


def kill_at(number: int) -> Hook:
    """The process dies at operation `number`, by SIGKILL: no handler and no clean-up runs."""

    def hook(operation: Operation) -> None:
        if operation.number == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def delay_at(number: int, seconds: float) -> Hook:
    """Operation `number` takes `seconds` longer, as on a disk or network that hangs."""

    def hook(operation: Operation) -> None:
        if operation.number == number:
            time.sleep(seconds)

    return hook


class _ShortWrite(OSError):
    """The disk takes the first half of a write."""


def short_at(number: int, code: int = errno.ENOSPC) -> Hook:
    """Operation `number`, a `write`, writes one half of its bytes and then fails with `code`; others just fail."""

    def hook(operation: Operation) -> None:
        if operation.number == number:
            raise _ShortWrite(code, os.strerror(code), operation.path)

    return hook


class FaultyStorage:
    """Calls `hook` before every operation of `inner` that is in `names`. A `Storage`; may be used from any thread.

    `log` holds the operations that were watched, in order.
    """

    def __init__(
        self, inner: Storage, hook: Hook = lambda _: None, *, names: Iterable[str] = OPERATIONS
    ) -> None:
        self._inner, self._hook, self._names = inner, hook, frozenset(names)
        if unknown := self._names - OPERATIONS:
            raise ValueError(
                f"no such operations: {sorted(unknown)}; there are {sorted(OPERATIONS)}"
            )
        self._lock = threading.Lock()
        self.log: list[Operation] = []

    def note(self, name: str, path: str) -> None:
        """Operation `name` on `path` is about to happen."""
        if name not in self._names:
            return
        with self._lock:
            operation = Operation(len(self.log), name, path)
            self.log.append(operation)
        self._hook(operation)

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> FileWriter:
        self.note("create", path)
        return _Writer(self, path, self._inner.create(path, nbytes, shared=shared))

    def open(self, path: str) -> FileReader:
        self.note("open", path)
        return _Reader(self, path, self._inner.open(path))

    def put(self, path: str, data: bytes) -> None:
        self.note("put", path)
        self._inner.put(path, data)

    def get(self, path: str, limit: int) -> bytes:
        self.note("get", path)
        return self._inner.get(path, limit)

    def list(self, path: str) -> list[Entry]:
        self.note("list", path)
        return self._inner.list(path)

    def remove(self, path: str) -> None:
        self.note("remove", path)
        self._inner.remove(path)

    def sync(self, path: str) -> None:
        self.note("sync", path)
        self._inner.sync(path)

    def free_bytes(self, path: str) -> int | None:
        self.note("free", path)
        return self._inner.free_bytes(path)


class _Writer:
    def __init__(self, storage: FaultyStorage, path: str, inner: FileWriter) -> None:
        self._storage, self._path, self._inner = storage, path, inner

    def write(self, offset: int, data: memoryview) -> None:
        try:
            self._storage.note("write", self._path)
        except _ShortWrite:
            self._inner.write(offset, data[: len(data) // 2 // ALIGNMENT * ALIGNMENT])
            raise
        self._inner.write(offset, data)

    def finish(self, nbytes: int) -> None:
        self._storage.note("finish", self._path)
        self._inner.finish(nbytes)

    def abort(self) -> None:
        self._inner.abort()


class _Reader:
    def __init__(self, storage: FaultyStorage, path: str, inner: FileReader) -> None:
        self._storage, self._path, self._inner = storage, path, inner
        self.nbytes = inner.nbytes

    def expect(self, offset: int, nbytes: int, keep: bool = False) -> int:
        return self._inner.expect(offset, nbytes, keep)

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        self._storage.note("read", self._path)
        self._inner.read_into(offset, nbytes, buffer, keep)

    def close(self) -> None:
        self._inner.close()
