"""What a path names, and its storage: an object store for `s3://bucket/run`, the local disk for all other paths.

The only module that looks at schemes. Whoever takes a path from a user passes it through `absolute`; whoever is given
no storage uses an `AnyStorage`. What object stores need is imported when the first URL is met.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePath

from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.storage import Entry, FileReader, FileWriter, Storage
from zero_ckpt.errors import ConfigurationError

__all__ = ["AnyStorage", "absolute", "expanded", "is_url", "local", "move", "resolved"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BROKEN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def is_url(path: str) -> bool:
    """Whether `path` names something in an object store."""
    return _URL.match(path) is not None


def _text(path: str | os.PathLike[str]) -> str:
    text = os.fsdecode(path).removeprefix("file://")
    if "\0" in text:
        raise ConfigurationError(f"{text!r}: a path cannot hold the character \\0.")
    if isinstance(path, PurePath) and _BROKEN_URL.match(text):
        raise ConfigurationError(
            f"{text}: a URL that was made a {type(path).__name__}, which drops a slash. Give it as a string."
        )
    return text


def expanded(path: str | os.PathLike[str]) -> str:
    """The path as text, `~` replaced. Raises as `absolute` does."""
    text = _text(path)
    return text if is_url(text) else os.path.expanduser(text)


def absolute(path: str | os.PathLike[str]) -> str:
    """The path as storages want it: absolute, `~` replaced; or a URL without empty parts. `file://` is the local disk.

    Raises `ConfigurationError` for a URL that was made a `Path`, which has lost one of its slashes.
    """
    text = expanded(path)
    if not is_url(text):
        return os.path.abspath(text)
    scheme, _, rest = text.partition("://")
    return f"{scheme}://" + "/".join(part for part in rest.split("/") if part)


def resolved(path: str) -> str:
    """The path behind symbolic links, of which an object store has none."""
    return path if is_url(path) else os.path.realpath(path)


def local(path: str | os.PathLike[str], what: str) -> str:
    """An absolute path on the local disk. Raises `ConfigurationError` for a URL; `what` was to be written there."""
    text = absolute(path)
    if is_url(text):
        raise ConfigurationError(
            f"{text}: {what} can be written to a mounted file system only. Give a local path, and copy the result."
        )
    return text


def move(storage: Storage, path: str, target: str) -> None:
    """Rename a finished file within its storage, replacing `target` atomically.

    An object store copies it on its own side and then removes the old name.
    """
    if not is_url(target):
        os.replace(path, target)
        return
    from zero_ckpt.core.object_storage import ObjectStorage

    remote = storage.at(target) if isinstance(storage, AnyStorage) else storage
    assert isinstance(remote, ObjectStorage)
    remote.move(path, target)


class AnyStorage:
    """Hands each call to the storage that its path belongs to. A `Storage`; may be used from any thread."""

    def __init__(self) -> None:
        self._local = LocalStorage()
        self._remote: dict[tuple[int, str], Storage] = {}

    def at(self, path: str) -> Storage:
        """Raises `ConfigurationError` for a scheme that is unknown, or whose package is missing."""
        match = _URL.match(path)
        if match is None:
            return self._local
        key = os.getpid(), match[1]  # connections do not survive a fork
        if key not in self._remote:
            from zero_ckpt.core.object_storage import ObjectStorage

            self._remote[key] = ObjectStorage(match[1])
        return self._remote[key]

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> FileWriter:
        return self.at(path).create(path, nbytes, shared=shared)

    def open(self, path: str) -> FileReader:
        return self.at(path).open(path)

    def put(self, path: str, data: bytes) -> None:
        self.at(path).put(path, data)

    def get(self, path: str, limit: int) -> bytes:
        return self.at(path).get(path, limit)

    def list(self, path: str) -> list[Entry]:
        return self.at(path).list(path)

    def remove(self, path: str) -> None:
        self.at(path).remove(path)

    def sync(self, path: str) -> None:
        self.at(path).sync(path)

    def free_bytes(self, path: str) -> int | None:
        return self.at(path).free_bytes(path)
