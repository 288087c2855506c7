"""Names of output files, and putting finished ones in place: complete, or not at all.

Files are written under hidden temporary names in the folder where they will be. When all are durable they are renamed;
an index file, without which several files are no result, comes last. What an earlier export left under the same name
is valid until then, and gone afterwards.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from zero_ckpt.core.places import absolute, is_url, move
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import ConfigurationError

__all__ = ["EXPORT_FOLDER", "FORMATS", "LIVE_TAG", "Output", "output_of"]

FORMATS = {
    "safetensors": ("model", ".safetensors"),
    "bin": ("pytorch_model", ".bin"),
    "ckpt": ("model", ".ckpt"),
}
"""Format -> name of its file in a folder."""

_SUFFIXES = {
    ".safetensors": ("safetensors",),
    ".bin": ("bin",),
    ".pt": ("bin", "ckpt"),
    ".pth": ("bin", "ckpt"),
    ".ckpt": ("ckpt",),
}
"""Suffix of a file's name -> the formats that it may be, the first unless another is asked for."""

_NOT_OURS = re.compile(
    r"\.(gguf|gz|h5|hdf5|joblib|json|keras|msgpack|np[yz]|onnx|pb|pickle|pkl|pt2|pte|safetensor|st|tar|tflite|zip)"
)
"""Suffixes by which a user means a file of a format that is not written here. Any other may end a folder's name."""

EXPORT_FOLDER = "fp32"
"""Where the export at the end of a training goes, beside the checkpoints."""

LIVE_TAG = ".live"
"""The checkpoint of live weights that is there while they are exported, when a training has saved none."""

_INDEX_LIMIT = 1 << 30


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

    def owns(self, name: str) -> bool:
        """Whether a result could have a file of this name."""
        stem, suffix = re.escape(self.stem), re.escape(self.suffix)
        return bool(re.fullmatch(rf"{stem}(-\d{{5,}}-of-\d{{5,}})?{suffix}", name))

    def publish(
        self,
        storage: Storage,
        finished: Mapping[str, str | None],
        index: Mapping[str, object] | None,
        old: Collection[str],
    ) -> list[str]:
        """Put finished files in place of what was there; returns all paths.

        `finished`: name -> where the file lies; None for one that is in place. `index`: for several files. `old`: names
        of files that are replaced.
        """
        names = list(finished)
        index_path = f"{self.folder}/{self.index_name}"
        if set(old) & set(names) and len(names) > 1:
            # New files take the names of old ones: without its index the old set is no result, so none is ever mixed.
            storage.remove(index_path)
            storage.sync(self.folder)
        for name, path in finished.items():
            if path is not None:
                move(storage, path, f"{self.folder}/{name}")
        storage.sync(self.folder)
        if index is not None:
            storage.put(index_path, (json.dumps(index, indent=2) + "\n").encode())
        else:
            storage.remove(index_path)
        for name in set(old) - set(names):
            storage.remove(f"{self.folder}/{name}")
        storage.sync(self.folder)
        paths = [f"{self.folder}/{name}" for name in names]
        return paths if index is None else [*paths, index_path]

    def old_files(self, storage: Storage) -> set[str]:
        """Names of the earlier result's files: the single one, and those that the index lists."""
        there = {entry.name for entry in storage.list(self.folder)}
        found = set(self.names(1)) & there
        with suppress(OSError, ValueError, AttributeError, KeyError):
            index = json.loads(storage.get(f"{self.folder}/{self.index_name}", _INDEX_LIMIT))
            found |= {name for name in index["weight_map"].values() if self.owns(name)}
        return found


def output_of(path: str | os.PathLike[str], format: str | None) -> Output:
    """Where an export to `path` goes: a file if it has a format's suffix, else a folder.

    A path that ends in `/`, or that is a folder already, is a folder whatever its suffix. Raises `ConfigurationError`
    for a format that is unknown or not the suffix's, and for the suffix of another kind of file.
    """
    if format is not None and format not in FORMATS:
        raise ConfigurationError(f"format is one of {', '.join(FORMATS)}; found {format!r}")
    target = absolute(path)
    folder, _, name = target.rpartition("/")
    stem, suffix = os.path.splitext(name)
    kinds = () if _is_folder(path, target) else _kinds(target, suffix.lower())
    if not kinds:
        kind = format or "safetensors"
        return Output(target, *FORMATS[kind], kind)
    if format is not None and format not in kinds:
        raise ConfigurationError(
            f"{target}: a file named *{suffix} in format {format!r}; use '{FORMATS[format][1]}' or a folder"
        )
    return Output(folder or "/", stem, suffix, format or kinds[0])


def _is_folder(path: str | os.PathLike[str], target: str) -> bool:
    return os.fspath(path).endswith("/") or (not is_url(target) and os.path.isdir(target))


def _kinds(target: str, suffix: str) -> tuple[str, ...]:
    """The formats that a file with this suffix may have; none for what is a folder's name."""
    if _NOT_OURS.fullmatch(suffix):
        raise ConfigurationError(
            f"{target}: '{suffix}' is the suffix of no format here. Known are {', '.join(_SUFFIXES)}; a folder of that "
            "name is meant by a '/' at its end."
        )
    return _SUFFIXES.get(suffix, ())
