"""What an export has finished so far: where its files lie before they are a result, and notes of what is in them.

An export that was interrupted and is run again need not write its finished files once more. While it runs, each file
lies under a hidden name, made of the export's key (which stands for source and options) and the run's own nonce. Beside
it lie notes, made when bytes are durable: the checksums of the windows that a lane has written. The next run with the
same key takes over each file whose windows are all noted and still have their checksums; whatever else it finds it
removes. A run never writes to a name with another's nonce, so two runs at once cannot write into one file.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import xxhash

from zero_ckpt.core.memory import aligned_buffer
from zero_ckpt.core.storage import FileWriter, Storage
from zero_ckpt.fp32.publishing import Output
from zero_ckpt.fp32.writing import WINDOW

__all__ = ["Journal", "NotedWriter"]

_NOTE_LIMIT = 64 << 20

Sums = dict[int, int]
"""Where a window begins -> the XXH3-64 of its bytes."""


@dataclass(slots=True)
class Journal:
    """The hidden files and notes of one run.

    `taken`: files that earlier runs have finished -> where each lies; None for one that is in place already.
    """

    storage: Storage
    output: Output
    key: str
    nonce: str
    taken: dict[str, str | None] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """Where this run writes file `name`."""
        return self._path(name, self.nonce)

    def replace(self, old: set[str]) -> set[str]:
        """Note the names of files that will be replaced; returns them, and those that earlier runs were to replace.

        After the new index is there, and before the last old file is removed, nothing else knows of the old files.
        """
        found = set(old)
        for entry, _ in self._hidden():
            if entry.endswith(".replaced"):
                with suppress(OSError, ValueError, TypeError):
                    names = json.loads(
                        self.storage.get(f"{self.output.folder}/{entry}", _NOTE_LIMIT)
                    )
                    found.update(name for name in names if self.output.owns(name))
        if found:
            stem = self._stem(f"{self.output.stem}{self.output.suffix}", self.nonce)
            path = f"{stem}.{uuid.uuid4().hex[:8]}.replaced"
            self.storage.put(path, json.dumps(sorted(found)).encode())
        return found

    def finished(self, name: str) -> str | None:
        """Where a finished file lies; None for one that is in place."""
        return self.taken.get(name, self.path(name))

    def note(self, name: str, sums: Mapping[int, int]) -> None:
        """Note that these windows of a file are durable: where each begins -> its checksum."""
        data = json.dumps({str(begin): f"{value:016x}" for begin, value in sums.items()})
        path = f"{self._stem(name, self.nonce)}.{uuid.uuid4().hex[:8]}.written"
        self.storage.put(path, data.encode())

    def take_over(
        self, names: Sequence[str], sizes: Sequence[int], alive: Callable[[], None]
    ) -> list[int]:
        """Take over the files that earlier runs with this key have finished; returns the numbers of those files.

        Every byte of them is read and compared; `alive` is called several times a second meanwhile. Everything else
        that exports to this output have left is removed.
        """
        noted = self._noted()
        kept: dict[str, str] = {}
        for name, nbytes in zip(names, sizes, strict=True):
            for nonce, sums in noted.get(name, {}).items():
                if name not in kept and self._take(name, nbytes, nonce, sums, alive):
                    kept[name] = nonce
        self.clear(lambda name, nonce: kept.get(name) == nonce)
        return [file for file, name in enumerate(names) if name in kept]

    def clear(
        self,
        keep: Callable[[str, str], bool] = lambda name, nonce: False,
        *,
        all_of_it: bool = False,
    ) -> None:
        """Remove the hidden files of exports to this output, except those of this key for which `keep(name, nonce)`.

        `all_of_it`: also the notes on files to be replaced, which are needed until these are removed.
        """
        for entry, (name, key, nonce) in list(self._hidden()):
            if entry.endswith(".replaced") and not all_of_it:
                continue
            if key != self.key or not keep(name, nonce):
                self.storage.remove(f"{self.output.folder}/{entry}")

    def clear_unfinished(self, sizes: Mapping[str, int]) -> None:
        """After an interruption: keep what the next run can take over. `sizes`: of the files, by name."""
        noted = self._noted()

        def is_whole(name: str, nonce: str) -> bool:
            return _covers(noted.get(name, {}).get(nonce, {}), sizes.get(name, 0))

        self.clear(is_whole)

    def _take(
        self, name: str, nbytes: int, nonce: str, sums: Sums, alive: Callable[[], None]
    ) -> bool:
        if not _covers(sums, nbytes):
            return False
        hidden = self._path(name, nonce)
        if self._holds(f"{self.output.folder}/{name}", nbytes, sums, alive):
            self.taken[name] = None
        elif self._holds(hidden, nbytes, sums, alive):
            self.taken[name] = hidden
        return name in self.taken

    def _holds(self, path: str, nbytes: int, sums: Sums, alive: Callable[[], None]) -> bool:
        """Whether `path` is a file of this length whose windows have these checksums."""
        buffer = aligned_buffer(WINDOW)
        try:
            file = self.storage.open(path)
        except OSError:
            return False
        try:
            if file.nbytes != nbytes:
                return False
            for begin in range(0, nbytes, WINDOW):
                count = min(WINDOW, nbytes - begin)
                file.read_into(begin, count, buffer)
                if xxhash.xxh3_64_intdigest(buffer[:count]) != sums[begin]:
                    return False
                alive()
        except (OSError, EOFError):
            return False
        finally:
            file.close()
        return True

    def _noted(self) -> dict[str, dict[str, Sums]]:
        """Name -> nonce -> what the notes with this key say."""
        found: dict[str, dict[str, Sums]] = {}
        for entry, (name, key, nonce) in self._hidden():
            if key != self.key or not entry.endswith(".written"):
                continue
            with suppress(OSError, ValueError, AttributeError):
                data = json.loads(self.storage.get(f"{self.output.folder}/{entry}", _NOTE_LIMIT))
                sums = {int(begin): int(value, 16) for begin, value in data.items()}
                found.setdefault(name, {}).setdefault(nonce, {}).update(sums)
        return found

    def _hidden(self) -> Iterator[tuple[str, tuple[str, str, str]]]:
        """(name in the folder, (file, key, nonce)) of each partial file and note, whatever export left it."""
        stem, suffix = re.escape(self.output.stem), re.escape(self.output.suffix)
        pattern = re.compile(
            rf"\.({stem}(?:-\d{{5,}}-of-\d{{5,}})?{suffix})\.(?:([0-9a-f]{{16}})\.)?([0-9a-f]{{8}})"
            r"\.(?:partial|[0-9a-f]{8}\.(?:written|replaced)(?:\.tmp)?)"
        )
        with suppress(FileNotFoundError):
            for entry in self.storage.list(self.output.folder):
                if match := pattern.fullmatch(entry.name):
                    yield entry.name, (match[1], match[2] or "", match[3])

    def _stem(self, name: str, nonce: str) -> str:
        return f"{self.output.folder}/.{name}.{self.key}.{nonce}"

    def _path(self, name: str, nonce: str) -> str:
        return f"{self._stem(name, nonce)}.partial"


def _covers(sums: Sums, nbytes: int) -> bool:
    return bool(sums) and all(begin in sums for begin in range(0, nbytes, WINDOW))


class NotedWriter:
    """A `FileWriter` that takes each window in one piece, and notes its checksum. `nbytes`: of the whole file."""

    def __init__(self, inner: FileWriter, nbytes: int) -> None:
        self._inner, self._nbytes = inner, nbytes
        self.sums: Sums = {}

    def write(self, offset: int, data: memoryview) -> None:
        self.sums[offset] = xxhash.xxh3_64_intdigest(data[: self._nbytes - offset])
        self._inner.write(offset, data)

    def finish(self, nbytes: int) -> None:
        self._inner.finish(nbytes)

    def abort(self) -> None:
        self._inner.abort()
