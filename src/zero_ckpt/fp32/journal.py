"""What an export has finished so far: where its files lie before they are a result, and notes of what is in them.

An export that was interrupted is run again and need not write its whole files once more. Each file of several lies
under a hidden name with the export's key, in which source and options are, and the run's own nonce; beside it lie
notes, made when the bytes are durable: the checksums of the windows that a lane has written. The next run with the same
key takes over each file whose windows are all noted, and all of which still have their checksums. Whatever else it
finds is removed. As a run never writes to a name with another's nonce, two of them at once cannot write into one file.
"""

from __future__ import annotations

import json
import os
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
    """Of one run. `in_place`: files that an earlier run with this key had put in place already."""

    storage: Storage
    output: Output
    key: str
    nonce: str
    in_place: set[str] = field(default_factory=set)

    def path(self, name: str) -> str:
        """Where this run writes file `name`."""
        return self._path(name, self.nonce)

    def note(self, name: str, sums: Mapping[int, int]) -> None:
        """These windows of a file are durable."""
        data = json.dumps({str(begin): f"{value:016x}" for begin, value in sums.items()})
        path = f"{self._stem(name, self.nonce)}.{uuid.uuid4().hex[:8]}.written"
        self.storage.put(path, data.encode())

    def take_over(
        self, names: Sequence[str], sizes: Sequence[int], alive: Callable[[], None]
    ) -> list[int]:
        """Make this run's what earlier ones with this key have finished; returns the numbers of those files.

        Every byte is read and compared. `alive` is called several times a second meanwhile. All else that exports to
        this output left is removed.
        """
        noted = self._noted()
        kept = [
            file
            for file, name in enumerate(names)
            if any(
                self._take(name, sizes[file], nonce, sums, alive)
                for nonce, sums in noted.get(name, {}).items()
            )
        ]
        self.clear(lambda name, nonce: nonce == self.nonce)
        return kept

    def clear(self, keep: Callable[[str, str], bool] = lambda name, nonce: False) -> None:
        """Remove hidden files of exports to this output, but for those with this key that `keep(name, nonce)`."""
        for entry, (name, key, nonce) in list(self._hidden()):
            if key != self.key or not keep(name, nonce):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self.output.folder}/{entry}")

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
        placed, hidden = f"{self.output.folder}/{name}", self._path(name, nonce)
        if self._holds(placed, nbytes, sums, alive):
            self.note(name, sums)
            self.in_place.add(name)
            return True
        if self._holds(hidden, nbytes, sums, alive):
            self.note(name, sums)
            with suppress(FileNotFoundError):  # another run has been faster
                os.replace(hidden, self.path(name))
                return True
        return False

    def _holds(self, path: str, nbytes: int, sums: Sums, alive: Callable[[], None]) -> bool:
        """Whether there is a file with these checksums."""
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
            r"\.(?:partial|[0-9a-f]{8}\.written(?:\.tmp)?)"
        )
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in sorted(os.listdir(self.output.folder)):
                if match := pattern.fullmatch(entry):
                    yield entry, (match[1], match[2] or "", match[3])

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
