"""One tag folder: what it holds. Imports no torch.

Owns the reading of a folder that may be a checkpoint, and what is said of one that is not. Promises: a manifest that it
returns has verified; nothing that lies in a folder makes it read more than `MAX_MANIFEST` bytes, and no tensor is read.
It changes nothing, and knows neither `latest` nor which of several folders is meant: those are `tags` and `finding`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from zero_ckpt.core.foreign import ForeignManifest, format_of
from zero_ckpt.core.manifest import MANIFEST_NAME, Manifest, Summary, parse_shard_name
from zero_ckpt.core.storage import Entry, Storage
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    CorruptManifestError,
    CorruptShardError,
    NothingSavedError,
    ZeroCkptError,
)

__all__ = [
    "ANOTHER_TAG",
    "DAMAGED_NAME",
    "USE_ANOTHER",
    "check_files",
    "committed_in",
    "contents",
    "file_instead",
    "holds_shards",
    "is_tag_folder",
    "loose_files",
    "names_in",
    "nothing_at",
    "read_manifest",
    "read_tag",
    "shown_tags",
    "summarize_tag",
    "was_replaced",
    "why_unread",
]

ANOTHER_TAG = "Restore the file, or load another tag."
USE_ANOTHER = "Else use another tag."

DAMAGED_NAME = f"{MANIFEST_NAME}.damaged"
"""The name of a manifest that `zero-ckpt repair` has put aside."""

MAX_MANIFEST = 1 << 30
"""Bytes. Larger manifests are refused: nothing that reads one may be made to fill the memory."""


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """The verified manifest of a tag folder.

    Raises `CheckpointNotFoundError` when there is none, `CorruptManifestError` or `FormatVersionError` otherwise.
    """
    data, path = _manifest_bytes(storage, folder)
    return Manifest.from_bytes(data, path)


def read_tag(storage: Storage, folder: str) -> Manifest:
    """What a tag folder holds, whoever wrote it: the manifest, or another system's files described as one.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `StateMismatchError`, `FormatVersionError` or
    `UnsafeObjectError`.
    """
    try:
        return read_manifest(storage, folder)
    except CheckpointNotFoundError as error:
        return _read_foreign(storage, folder, error)


def summarize_tag(storage: Storage, folder: str) -> Summary:
    """What a list of tags needs of `read_tag`: the manifest's checksum is verified, its tensors are not parsed."""
    try:
        return Summary.from_bytes(*_manifest_bytes(storage, folder))
    except CheckpointNotFoundError as error:
        return _read_foreign(storage, folder, error)


def was_replaced(storage: Storage, folder: str, known: Manifest) -> bool:
    """Whether somebody has overwritten or removed the checkpoint since it was read: then what it lacks is no damage."""
    try:
        return read_tag(storage, folder) != known
    except CheckpointNotFoundError:
        return True
    except (ZeroCkptError, OSError):
        return False


def is_tag_folder(storage: Storage, path: str) -> bool:
    """Whether `path` itself holds a checkpoint, readable or not: a manifest, or another system's files."""
    names = names_in(storage, path)
    return MANIFEST_NAME in names or format_of(names) is not None


def check_files(storage: Storage, folder: str, manifest: Summary) -> None:
    """Raises `CorruptCheckpointError` unless every listed file is there and has its length. Reads no data.

    Another system's checkpoint is passed over: its files were looked at when it was opened.
    """
    if isinstance(manifest, ForeignManifest):
        return
    try:
        there = {entry.name: entry.nbytes for entry in storage.list(folder)}
    except OSError as error:
        raise CorruptCheckpointError(f"{folder}: cannot be read: {why_unread(error)}") from error
    for name, record in manifest.files.items():
        found = there.get(name)
        if found != record.nbytes:
            wrong = (
                "missing, although the manifest lists it"
                if found is None
                else f"{record.nbytes} bytes expected, {found} found: the file is truncated or was replaced"
            )
            raise CorruptShardError(f"{folder}/{name}: {wrong}. {ANOTHER_TAG}")


def _manifest_bytes(storage: Storage, folder: str) -> tuple[bytes, str]:
    """The content of a folder's manifest, not yet checked, and its path."""
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        data = storage.get(path, MAX_MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise nothing_at(storage, folder) from None
    except (OSError, ValueError) as error:
        raise CorruptManifestError(f"{path}: cannot be read: {why_unread(error)}") from error
    return data, path


def _read_foreign(storage: Storage, folder: str, error: CheckpointNotFoundError) -> Manifest:
    """Another system's checkpoint in a folder without a manifest. Raises `error` when there is none."""
    found = format_of(names_in(storage, folder))
    if found is None:
        raise error
    return found.open_tag(storage, folder)


def nothing_at(storage: Storage, folder: str) -> CheckpointNotFoundError:
    """An error that says what `folder`, which holds no manifest, is instead of a checkpoint."""
    try:
        names = [entry.name for entry in storage.list(folder)]
    except NotADirectoryError:
        return file_instead(storage, folder, "a checkpoint's folder")
    except FileNotFoundError:
        directory = os.path.dirname(folder)
        if is_tag_folder(storage, directory):
            return CheckpointNotFoundError(
                f"{folder}: no such checkpoint; {directory} is one checkpoint, and no directory of them. Give it "
                f"without a tag, or {os.path.dirname(directory)} with the tag '{os.path.basename(directory)}'."
            )
        tags = committed_in(storage, directory)
        if not tags:
            return NothingSavedError(
                f"{folder}: no such checkpoint; {directory} {contents(storage, directory)}"
            )
        return CheckpointNotFoundError(
            f"{folder}: no such checkpoint; {directory} has {shown_tags(tags)}. Give one of these tags, or none for "
            "the newest."
        )
    except OSError as error:
        return CheckpointNotFoundError(f"{folder}: cannot be opened: {why_unread(error)}")
    if holds_shards(names) and DAMAGED_NAME in names:
        return CheckpointNotFoundError(
            f"{folder}: not committed: 'zero-ckpt repair --quarantine' has put its manifest aside, as {DAMAGED_NAME}, "
            "because shard files of it are damaged. Use another tag"
        )
    if holds_shards(names):
        return CheckpointNotFoundError(
            f"{folder}: not committed: it holds shard files, but no {MANIFEST_NAME}. Its save did not finish, or "
            f"still runs, or that file was deleted: 'zero-ckpt repair {folder}' rebuilds it where all files are there. "
            + USE_ANOTHER
        )
    return CheckpointNotFoundError(
        f"{folder}: not a zero_ckpt checkpoint: no {MANIFEST_NAME} there, it {contents(storage, folder)}. Give a "
        "folder that a save has made"
    )


def file_instead(storage: Storage, path: str, expected: str) -> CheckpointNotFoundError:
    """An error that says that `path` is a file, and which folder was meant if it is a file of a checkpoint."""
    folder = os.path.dirname(path)
    belongs = is_tag_folder(storage, folder) or os.path.basename(path) == "latest"
    remedy = (
        f"Give its folder, {folder}"
        if belongs
        else "Lightning's own .ckpt and other single files are read with torch.load"
    )
    return CheckpointNotFoundError(f"{path}: a file, where {expected} was expected. {remedy}")


def committed_in(storage: Storage, directory: str) -> list[str]:
    """Tags of a directory that may be loaded, with numbers in their names in order: `step9` before `step10`."""
    try:
        names = [entry.name for entry in storage.list(directory) if entry.is_dir]
    except OSError:
        return []
    tags = []
    for name in names:
        inside = names_in(storage, f"{directory}/{name}")
        if MANIFEST_NAME in inside or format_of(inside) is not None:
            tags.append(name)
    return sorted(tags, key=_natural)


def _natural(tag: str) -> list[tuple[int, str]]:
    """A key by which step9 comes before step10."""
    parts = re.findall(r"\d+|\D+", tag)
    return [(len(part) if part.isdigit() else 0, part) for part in parts]


def shown_tags(tags: Sequence[str]) -> str:
    """The last few of these tags, quoted."""
    return ("... " if len(tags) > 4 else "") + ", ".join(f"'{tag}'" for tag in tags[-4:])


def contents(storage: Storage, folder: str) -> str:
    """A few words on what is in a folder."""
    try:
        entries = storage.list(folder)
    except OSError:
        return "does not exist"
    names = [entry.name for entry in entries]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    shown = ", ".join(f"'{name}'" for name in names[:4]) + more
    kind = ""
    if ".metadata" in names:
        kind = ", a checkpoint of torch.distributed.checkpoint"
    elif any(entry.name.endswith(".ckpt") and not entry.is_dir for entry in entries):
        kind = ", with plain files of Lightning's, of which ckpt_path and torch.load take one"
    return f"holds {shown}{kind}" if names else "is empty"


def why_unread(error: Exception) -> str:
    """Why a file could not be read. The caller names it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is no text" if isinstance(error, UnicodeDecodeError) else str(error)


def names_in(storage: Storage, folder: str) -> list[str]:
    """Names in a folder; none when there is no such folder."""
    try:
        return [entry.name for entry in storage.list(folder)]
    except OSError:
        return []


def holds_shards(names: Sequence[str]) -> bool:
    """Whether these are files of a save. Exported weights have the same names, and an index beside them."""
    if any(name.endswith(".safetensors.index.json") for name in names):
        return False
    return any(parse_shard_name(name) is not None for name in names)


def loose_files(entries: Sequence[Entry], listed: Collection[str]) -> list[Entry]:
    """Of the `entries` of a tag's folder, files that saves of ours wrote and that belong to no checkpoint.

    They are left from generations that were overwritten, and from saves that never committed. `listed`: the names in
    the manifest's `files`. Files of any other name are somebody else's, and stay where they are.
    """
    return [
        entry
        for entry in entries
        if not entry.is_dir and entry.name not in listed and _is_written_by_saves(entry.name)
    ]


def _is_written_by_saves(name: str) -> bool:
    """Whether it is a shard file, or a manifest that has not been moved into its place."""
    return name == f"{MANIFEST_NAME}.tmp" or parse_shard_name(name) is not None
