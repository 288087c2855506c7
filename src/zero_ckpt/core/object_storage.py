"""Object stores, through fsspec: `s3://`, `gs://`, `az://`, `memory://` and whatever else it knows. A `Storage`.

An object appears whole or not at all, and is durable once its upload was answered: so the upload of the manifest is the
commit, and there is nothing to sync. Large files go up in parts, several at a time, from buffers of their own: at most
`PARTS_IN_FLIGHT + 2` of `part_bytes` each. Throttling and broken connections are tried again by the library below;
what it gives up on is an OSError. Listings are never cached.

Credentials, endpoints and the like come from the environment and fsspec's configuration, as for every fsspec user, or
as options: `Checkpointer(model, storage=ObjectStorage("s3", endpoint_url=...))`.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

from zero_ckpt.core.memory import round_up
from zero_ckpt.core.object_writer import ObjectWriter
from zero_ckpt.core.storage import Entry, FileReader, FileWriter
from zero_ckpt.core.uploads import abort_unfinished, as_oserror
from zero_ckpt.errors import ConfigurationError

__all__ = ["ObjectStorage"]

_PART_BYTES = 8 << 20
"""S3 takes parts of at least 5 MiB but for the last."""

_MAX_PARTS = 9_000
"""S3 takes 10,000."""


class ObjectStorage:
    """The objects that one of fsspec's file systems reaches. May be used from any thread.

    `protocol`: a scheme that fsspec knows; `options` go to its file system. Raises `ConfigurationError` when fsspec or
    the scheme's package is missing.
    """

    def __init__(self, protocol: str, **options: Any) -> None:
        self._system = _file_system(protocol, options)

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> FileWriter:
        """A file that appears when it is finished. What a crashed save has left of an earlier one goes away."""
        if shared:
            raise OSError(errno.EOPNOTSUPP, "objects have one writer", path)
        with as_oserror(path):
            abort_unfinished(self._system, path)
        return ObjectWriter(self._system, path, max(_PART_BYTES, nbytes // _MAX_PARTS))

    def open(self, path: str) -> FileReader:
        with as_oserror(path):
            info = self._system.info(path)
        if info["type"] != "file":
            raise IsADirectoryError(errno.EISDIR, "a file expected", path)
        return _ObjectReader(self._system, path, int(info["size"]))

    def put(self, path: str, data: bytes) -> None:
        with as_oserror(path):
            self._system.pipe_file(path, data)

    def get(self, path: str, limit: int) -> bytes:
        with as_oserror(path):
            nbytes = self._system.info(path)["size"]
            if nbytes <= limit:
                # In one request: a writer may replace it meanwhile.
                return bytes(self._system.cat_file(path))
        raise ValueError(
            f"it is {nbytes} bytes long, longer than the {limit} bytes that such a file may have"
        )

    def list(self, path: str) -> list[Entry]:
        with as_oserror(path):
            found = self._system.ls(path, detail=True)
        here = self._system._strip_protocol(path).strip("/")
        if any(item["name"].strip("/") == here and item["type"] == "file" for item in found):
            raise NotADirectoryError(errno.ENOTDIR, "a folder expected", path)
        entries = [_entry(item) for item in found if item["name"].strip("/") != here]
        return sorted(entries, key=lambda entry: entry.name)

    def remove(self, path: str) -> None:
        with as_oserror(path):
            abort_unfinished(self._system, path)
            with suppress(FileNotFoundError):
                self._system.rm(path, recursive=True)

    def move(self, path: str, target: str) -> None:
        """Rename an object of any size, beyond the protocol: the store itself copies it, then the old name goes."""
        with as_oserror(target):
            self._system.cp_file(path, target)
        self.remove(path)

    def sync(self, path: str) -> None:
        """Nothing to do: objects are durable, and folders are only the names of objects."""

    def free_bytes(self, path: str) -> int | None:
        return None


def _file_system(protocol: str, options: dict[str, Any]) -> Any:
    """A file system of our own: its listings are not cached, and no other user of fsspec shares it."""
    hint = "Install zero-ckpt[remote], and the package that fsspec names for this scheme."
    try:
        import fsspec
    except ImportError as error:
        raise ConfigurationError(f"{protocol}://: fsspec is not installed. {hint}") from error
    try:
        return fsspec.filesystem(
            protocol, skip_instance_cache=True, use_listings_cache=False, **options
        )
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"{protocol}://: {error}. {hint}") from error


def _entry(item: dict[str, Any]) -> Entry:
    name = item["name"].rstrip("/").rpartition("/")[2]
    return Entry(name, item["type"] == "directory", int(item["size"] or 0))


class _ObjectReader:
    """Each read is one ranged request."""

    def __init__(self, system: Any, path: str, nbytes: int) -> None:
        self._system, self._path, self.nbytes = system, path, nbytes

    def expect(self, offset: int, nbytes: int, keep: bool = False) -> int:
        return round_up(nbytes)

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        if not nbytes:
            return
        data = b""
        if offset + nbytes <= self.nbytes:
            with as_oserror(self._path):
                data = self._system.cat_file(self._path, start=offset, end=offset + nbytes)
        if len(data) != nbytes:
            raise EOFError(f"the file ends at byte {min(self.nbytes, offset + len(data))}")
        buffer[:nbytes] = data

    def close(self) -> None:
        """Nothing is open between requests."""
