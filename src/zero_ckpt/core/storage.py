"""The one seam between checkpoints and bytes: the `Storage` protocol, and what it hands out.

Every system call or request that touches a checkpoint is made by something that follows it: the local disk
(`local_storage`), an object store (`object_storage`), or a test's double. Each promises: a file that
`FileWriter.finish` returned for is durable; a name that `put` returned for holds all of the new bytes or, after a
crash, all of the old; a write or an fsync that failed is never reported as done. None knows what the bytes mean.
`zero_ckpt.testing.conformance` holds an implementation to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Entry", "FileReader", "FileWriter", "Storage"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder. A symbolic link counts as no folder, whatever it leads to."""

    name: str
    is_dir: bool
    nbytes: int


class FileWriter(Protocol):
    """A new file. Parts are aligned, multiples of `ALIGNMENT` long, and may come from several threads in any order."""

    def write(self, offset: int, data: memoryview) -> None: ...

    def finish(self, nbytes: int) -> None:
        """Cut to `nbytes` (padding of the last part goes away), make durable, close."""

    def abort(self) -> None:
        """Close and remove what was written; a shared file stays, since others write to it. Never raises."""


class FileReader(Protocol):
    """An existing file, opened once. Reads may come from several threads."""

    nbytes: int

    def expect(self, offset: int, nbytes: int, keep: bool = False) -> int:
        """Called before these bytes are read: how many of them to ask for at once, a multiple of `ALIGNMENT`.

        Few where they come through this host's page cache, so that they can be worked on while a core's own cache holds
        them; they may then be read into any memory. All of them where every read is a request to a disk or a server.
        `keep`: as in `read_into`.
        """

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        """Read exactly `nbytes` into the start of the aligned `buffer`, which has room for `round_up(nbytes)`.

        `offset` is aligned. `keep`: the same bytes will be read again soon. Raises EOFError when the file is shorter.
        """

    def close(self) -> None: ...


class Storage(Protocol):
    """What a place for checkpoints must do. Paths are absolute and `/`-separated. Errors are OSErrors."""

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> FileWriter:
        """A new or emptied file with room for `nbytes` reserved where the file system can; parents are made.

        `shared`: the file is there already; this writer and those of other ranks each write their own parts of it.
        """

    def open(self, path: str) -> FileReader: ...

    def put(self, path: str, data: bytes) -> None:
        """Replace the file at `path` atomically and durably; parents are made."""

    def get(self, path: str, limit: int) -> bytes:
        """The whole file. Raises ValueError when it is longer than `limit` bytes."""

    def list(self, path: str) -> list[Entry]:
        """The folder's entries by name. Raises FileNotFoundError or NotADirectoryError."""

    def remove(self, path: str) -> None:
        """Remove a file, a link (not what it names) or a folder with all in it. Missing is fine."""

    def sync(self, path: str) -> None:
        """Make the folder's entries, made or removed before, durable."""

    def free_bytes(self, path: str) -> int | None:
        """Bytes that may still be written below `path`, or None when unknown."""
