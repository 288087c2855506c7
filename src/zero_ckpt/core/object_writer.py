"""A new object that is written like a file: pieces from several threads become parts, uploaded a few at a time.

Holds at most `PARTS_IN_FLIGHT` parts that are being uploaded, and the few that the writing threads are filling.
Promises: the object appears when `finish` returns, and never without all its bytes.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from zero_ckpt.core.memory import round_up
from zero_ckpt.core.threads import thread_pool
from zero_ckpt.core.uploads import Upload, as_oserror, begin_upload

__all__ = ["PARTS_IN_FLIGHT", "ObjectWriter"]

PARTS_IN_FLIGHT = 4


class _Part:
    """One part being filled. Threads write to different places of it."""

    __slots__ = ("data", "filled")

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)
        self.filled = 0


class ObjectWriter:
    """A `FileWriter`. `system`: a file system of fsspec's.

    The last part is held back until `finish`, which is told where its padding begins.
    """

    def __init__(self, system: Any, path: str, part_bytes: int) -> None:
        self._system, self._path, self._part_bytes = system, path, round_up(part_bytes)
        self._lock = threading.Lock()
        self._parts: dict[int, _Part] = {}
        self._sent: dict[int, Future[None]] = {}
        self._slots = threading.Semaphore(PARTS_IN_FLIGHT)
        self._upload: Upload | None = None
        self._pool = thread_pool(PARTS_IN_FLIGHT, "zero_ckpt-upload")

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            number, at = divmod(offset, self._part_bytes)
            piece = data[: self._part_bytes - at]
            with self._lock:
                part = self._parts.get(number) or self._parts.setdefault(
                    number, _Part(self._part_bytes)
                )
            part.data[at : at + len(piece)] = piece
            with self._lock:
                part.filled += len(piece)
            data, offset = data[len(piece) :], offset + len(piece)
        for number, part in self._take_full():
            self._send(number, part.data)

    def finish(self, nbytes: int) -> None:
        try:
            if not self._sent and nbytes <= self._part_bytes:
                part = self._parts.pop(0, None) or _Part(nbytes)
                with as_oserror(self._path):
                    self._system.pipe_file(self._path, bytes(memoryview(part.data)[:nbytes]))
            else:
                self._complete(nbytes)
        finally:
            self._pool.shutdown()

    def _complete(self, nbytes: int) -> None:
        for number in range(-(-nbytes // self._part_bytes)):
            if number not in self._sent:
                part = self._parts.pop(number, None) or _Part(self._part_bytes)
                self._send(number, part.data[: nbytes - number * self._part_bytes])
        for future in self._sent.values():
            future.result()
        with as_oserror(self._path):
            self._begun().complete()

    def abort(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        with suppress(Exception):
            if self._upload is not None:
                self._upload.abort()
        with suppress(Exception):
            self._system.rm_file(self._path)

    def _take_full(self) -> list[tuple[int, _Part]]:
        with self._lock:
            last = max(self._parts, default=0)
            full = [n for n, p in self._parts.items() if p.filled == self._part_bytes and n < last]
            return [(number, self._parts.pop(number)) for number in full]

    def _send(self, number: int, data: bytearray) -> None:
        """Upload a part on another thread, when one is free. Raises what the upload of an earlier one raised."""
        self._slots.acquire()
        try:
            for future in list(self._sent.values()):
                if future.done():
                    future.result()
            self._sent[number] = self._pool.submit(self._upload_part, number, data)
        except BaseException:
            self._slots.release()
            raise

    def _upload_part(self, number: int, data: bytearray) -> None:
        try:
            with as_oserror(self._path):
                self._begun().part(number, memoryview(data))
        finally:
            self._slots.release()

    def _begun(self) -> Upload:
        with self._lock:
            if self._upload is None:
                self._upload = begin_upload(self._system, self._path)
            return self._upload
