"""A `Storage` in memory, for property tests of what lies above it: no disk, no syncing, many examples."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from zero_ckpt.core.storage import Entry


class _Writer:
    def __init__(self, files: dict[str, bytes], path: str) -> None:
        self._files, self._path, self._data = files, path, bytearray()
        self._lock = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        assert offset % 4096 == len(data) % 4096 == 0
        with self._lock:  # from several threads, in any order
            self._data.extend(bytes(max(0, offset + len(data) - len(self._data))))
            self._data[offset : offset + len(data)] = data

    def finish(self, nbytes: int) -> None:
        assert nbytes <= len(self._data)
        self._files[self._path] = bytes(self._data[:nbytes])

    def abort(self) -> None:
        self._files.pop(self._path, None)


class _Reader:
    def __init__(self, data: bytes, far: bool) -> None:
        self._data, self.nbytes, self._far = data, len(data), far

    def expect(self, offset: int, nbytes: int, keep: bool = False) -> int:
        return -(-nbytes // 4096) * 4096 if self._far else 512

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        assert offset % 512 == 0
        if offset + nbytes > self.nbytes:
            raise EOFError(f"the file ends at byte {self.nbytes}")
        buffer[:nbytes] = self._data[offset : offset + nbytes]

    def close(self) -> None:
        pass


@dataclass
class MemoryStorage:
    """Files by path. `far`: blocks are read whole, as from a disk; else in windows, as from the page cache."""

    files: dict[str, bytes] = field(default_factory=dict)
    far: bool = False

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> _Writer:
        return _Writer(self.files, path)

    def open(self, path: str) -> _Reader:
        if path not in self.files:
            raise FileNotFoundError(2, "no such file", path)
        return _Reader(self.files[path], self.far)

    def put(self, path: str, data: bytes) -> None:
        self.files[path] = data

    def get(self, path: str, limit: int) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(2, "no such file", path)
        return self.files[path]

    def list(self, path: str) -> list[Entry]:
        below = [p[len(path) + 1 :] for p in self.files if p.startswith(f"{path}/")]
        return sorted(
            {
                Entry(p.partition("/")[0], "/" in p, len(self.files.get(f"{path}/{p}", b"")))
                for p in below
            },
            key=lambda entry: entry.name,
        )

    def remove(self, path: str) -> None:
        for name in [p for p in self.files if p == path or p.startswith(f"{path}/")]:
            del self.files[name]

    def sync(self, path: str) -> None:
        pass

    def free_bytes(self, path: str) -> int | None:
        return None
