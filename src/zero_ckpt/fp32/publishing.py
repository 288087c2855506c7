"""Names of output files, and putting finished ones in place: complete, or not at all.

Files are written under hidden temporary names in the folder where they will be. When all are durable they are renamed;
an index file, without which several files are no result, comes last. What an earlier export left under the same name
is valid until then, and gone afterwards.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zero_ckpt.core.places import local
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import ConfigurationError

__all__ = ["FORMATS", "Output", "output_of"]

FORMATS = {
    "safetensors": ("model", ".safetensors"),
    "bin": ("pytorch_model", ".bin"),
    "ckpt": ("model", ".ckpt"),
}
"""Format -> name of its file in a folder."""


@dataclass(frozen=True, slots=True)
class Output:
    """One result: `<stem><suffix>` in `folder`, or several files and an index."""

    folder: str
    stem: str
    suffix: str
    format: str

    def names(self, count: int) -> list[str]:
        if count == 1:
            return [os.path.basename(self.path)]
        return [f"{self.stem}-{i:05d}-of-{count:05d}{self.suffix}" for i in range(1, count + 1)]

    @property
    def path(self) -> str:
        """Where a result of one file goes."""
        return f"{self.folder}/{self.stem}{self.suffix}"

    @property
    def index_name(self) -> str:
        return f"{self.stem}{self.suffix}.index.json"

    def publish(
        self,
        storage: Storage,
        finished: Mapping[str, str | None],
        index: Mapping[str, object] | None,
    ) -> list[str]:
        """Put finished files in place of what was there; returns all paths.

        `finished`: name -> where the file lies; None for one that is in place. `index`: for several files.
        """
        names = list(finished)
        old = self._old_files()
        index_path = f"{self.folder}/{self.index_name}"
        if old & set(names) and len(names) > 1:
            # New files take the names of old ones: without its index the old set is no result, so none is ever mixed.
            storage.remove(index_path)
            storage.sync(self.folder)
        for name, path in finished.items():
            if path is not None:
                os.replace(path, f"{self.folder}/{name}")
        storage.sync(self.folder)
        if index is not None:
            storage.put(index_path, (json.dumps(index, indent=2) + "\n").encode())
        else:
            storage.remove(index_path)
        for name in old - set(names):
            storage.remove(f"{self.folder}/{name}")
        storage.sync(self.folder)
        paths = [f"{self.folder}/{name}" for name in names]
        return paths if index is None else [*paths, index_path]

    def _old_files(self) -> set[str]:
        """Names of the earlier result's files: the single one, and those that the index lists."""
        found = set(self.names(1)) & set(os.listdir(self.folder))
        shard = re.compile(rf"{re.escape(self.stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(self.suffix)}")
        with suppress(OSError, ValueError, AttributeError, KeyError):
            listed = json.loads(Path(self.folder, self.index_name).read_text())["weight_map"]
            found |= {name for name in listed.values() if shard.fullmatch(name)}
        return found


def output_of(path: str | os.PathLike[str], format: str | None) -> Output:
    """A path with the suffix of a format is a file's, any other a folder's. Raises `ConfigurationError`."""
    if format is not None and format not in FORMATS:
        raise ConfigurationError(f"format is one of {', '.join(FORMATS)}; found {format!r}")
    target = Path(local(path, "full weights"))
    suffixes = {suffix: name for name, (_, suffix) in FORMATS.items()}
    if target.is_dir() or target.suffix not in suffixes:
        kind = format or "safetensors"
        return Output(str(target), *FORMATS[kind], kind)
    kind = suffixes[target.suffix]
    if format is not None and format != kind:
        raise ConfigurationError(
            f"{target}: a file named *{target.suffix} in format {format!r}; use '{FORMATS[format][1]}' or a folder"
        )
    return Output(str(target.parent), target.stem, target.suffix, kind)
