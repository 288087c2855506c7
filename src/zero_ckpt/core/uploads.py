"""One large object on its way into a store, in parts: as S3's multi-part upload, or as a file of fsspec's.

Promises: the object appears when `complete` returns, whole, and not before; after `abort` nothing of it is left, and
nothing is billed. Parts are numbered from 0, come from several threads, and may come in any order.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

__all__ = ["Upload", "abort_unfinished", "as_oserror", "begin_upload"]


@contextmanager
def as_oserror(path: str) -> Iterator[None]:
    """Make OSErrors of whatever a store's library raises inside. An OSError without a path is given `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(_code(error), str(error), path) from error
        if error.filename is None:
            error.filename = path
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from error


def _code(error: OSError) -> int:
    kinds = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
    kinds |= {NotADirectoryError: errno.ENOTDIR, TimeoutError: errno.ETIMEDOUT}
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), errno.EIO)


class Upload(Protocol):
    def part(self, number: int, data: memoryview) -> None:
        """Upload one part. `data` may be changed once this has returned."""

    def complete(self) -> None: ...

    def abort(self) -> None: ...


def begin_upload(system: Any, path: str) -> Upload:
    """`system`: a file system of fsspec's. S3 takes parts in parallel; others get them in order."""
    return _S3Upload(system, path) if _is_s3(system) else _OrderedUpload(system, path)


def abort_unfinished(system: Any, path: str) -> None:
    """Remove what crashed jobs have uploaded for `path`, or for what is below it, and never completed."""
    if not _is_s3(system):
        return
    bucket, key, _ = system.split_path(path)
    found: dict[str, Any] = {}
    with suppress(PermissionError):  # then the bucket's own rules remove them
        found = system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
    for upload in found.get("Uploads", ()):
        if upload["Key"] == key or upload["Key"].startswith(f"{key}/"):
            names = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            with suppress(FileNotFoundError):  # somebody else was faster
                system.call_s3("abort_multipart_upload", **names)


def _is_s3(system: Any) -> bool:
    return hasattr(system, "call_s3") and hasattr(system, "split_path")


class _S3Upload:
    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        bucket, key, _ = system.split_path(path)
        self._names = {"Bucket": bucket, "Key": key}
        self._names["UploadId"] = self._call("create_multipart_upload")["UploadId"]
        self._tags: dict[int, str] = {}

    def part(self, number: int, data: memoryview) -> None:
        answer = self._call("upload_part", PartNumber=number + 1, Body=bytes(data))
        self._tags[number] = answer["ETag"]

    def complete(self) -> None:
        parts = [{"PartNumber": n + 1, "ETag": tag} for n, tag in sorted(self._tags.items())]
        self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        # A beginning whose answer was lost was tried again, and is an upload of its own.
        abort_unfinished(self._system, self._path)

    def abort(self) -> None:
        self._call("abort_multipart_upload")
        abort_unfinished(self._system, self._path)

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._system.call_s3(method, **self._names, **arguments)


class _OrderedUpload:
    """Parts that come early wait for those before them."""

    def __init__(self, system: Any, path: str) -> None:
        self._file = system.open(path, "wb", autocommit=False)
        self._lock = threading.Lock()
        self._early: dict[int, bytes] = {}
        self._next = 0

    def part(self, number: int, data: memoryview) -> None:
        with self._lock:
            self._early[number] = bytes(data)
            while self._next in self._early:
                self._file.write(self._early.pop(self._next))
                self._next += 1

    def complete(self) -> None:
        self._file.close()
        self._file.commit()

    def abort(self) -> None:
        self._file.discard()
