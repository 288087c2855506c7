"""Tags and `latest`: names of checkpoints in a checkpoint directory, and how one is found. Imports no torch.

A tag is a folder of the checkpoint directory. It is a checkpoint once its manifest verifies; anything else in the
directory is left alone. `latest` is a file that holds one tag's name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zero_ckpt.core.manifest import MANIFEST_NAME, Manifest
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    CorruptManifestError,
    CorruptShardError,
    ZeroCkptError,
)

__all__ = [
    "LATEST_NAME",
    "NOT_COMMITTED",
    "Found",
    "TagInfo",
    "candidates",
    "check_files",
    "check_tag",
    "fallback_notice",
    "find_checkpoint",
    "is_tag_folder",
    "list_tags",
    "locate",
    "no_checkpoint",
    "prune",
    "read_latest",
    "read_manifest",
    "remove_tag",
]

LATEST_NAME = "latest"
NOT_COMMITTED = "not committed"
MAX_MANIFEST = 1 << 30
"""Bytes. Larger manifests are refused: nothing that reads one may be made to fill the memory."""


@dataclass(frozen=True, slots=True)
class TagInfo:
    """One tag folder. `manifest` is None when it cannot be used; `problem` is then `NOT_COMMITTED`, or the damage."""

    name: str
    manifest: Manifest | None
    problem: str = ""


def check_tag(tag: object) -> str:
    """The tag as a string. Raises `ConfigurationError` for one that a path or a file system would misread."""
    name = str(tag)
    bad = (
        set(name) & set("/\\\0\n\r")
        or name in ("", ".", "..", LATEST_NAME)
        or len(name.encode()) > 200
    )
    if bad or name != name.strip() or name.startswith("-"):
        raise ConfigurationError(
            f"tag {name!r} cannot be a folder's name: expected 1 to 200 bytes without slashes, line breaks, "
            f"surrounding spaces or a leading '-', and not '{LATEST_NAME}', '.' or '..'"
        )
    return name


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """The verified manifest of a tag folder.

    Raises `CheckpointNotFoundError` when there is none, `CorruptManifestError` or `FormatVersionError` otherwise.
    """
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        data = storage.get(path, MAX_MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(
            f"{folder}: no {MANIFEST_NAME}: not a committed zero_ckpt checkpoint "
            "(a save that did not finish, or a folder of something else)"
        ) from error
    except IsADirectoryError as error:
        raise CorruptManifestError(f"{path}: a folder, where a file was expected") from error
    return Manifest.from_bytes(data, path)


def is_tag_folder(storage: Storage, path: str) -> bool:
    """Whether `path` itself holds a manifest, readable or not."""
    try:
        return any(entry.name == MANIFEST_NAME for entry in storage.list(path))
    except OSError:
        return False


def read_latest(storage: Storage, directory: str) -> str | None:
    """The tag that `latest` names, or None when there is no such file or it is empty or unusable."""
    try:
        text = storage.get(f"{directory}/{LATEST_NAME}", 4096).decode()
        return check_tag(text.strip())
    except (OSError, ValueError):
        return None


def list_tags(storage: Storage, directory: str) -> list[TagInfo]:
    """Every tag folder, oldest first (by step, then time of commit); folders without a manifest come first.

    A folder counts when it holds a manifest or a shard file. Raises `CheckpointNotFoundError` without a directory.
    """
    try:
        entries = storage.list(directory)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(f"{directory}: no such checkpoint directory") from error
    infos = [info for e in entries if e.is_dir and (info := _inspect(storage, directory, e.name))]
    return sorted(infos, key=_age)


def _age(info: TagInfo) -> tuple[int, float, str]:
    m = info.manifest
    return (-1, 0.0, info.name) if m is None else (m.step, m.created, info.name)


def _inspect(storage: Storage, directory: str, name: str) -> TagInfo | None:
    folder = f"{directory}/{name}"
    try:
        return TagInfo(name, read_manifest(storage, folder))
    except CheckpointNotFoundError:
        names = (
            [entry.name for entry in storage.list(folder)] if not _is_gone(storage, folder) else []
        )
        return TagInfo(name, None, NOT_COMMITTED) if _holds_shards(names) else None
    except (ZeroCkptError, OSError) as error:
        return TagInfo(name, None, str(error))


def _is_gone(storage: Storage, folder: str) -> bool:
    try:
        storage.list(folder)
    except OSError:
        return True
    return False


def locate(storage: Storage, path: str, tag: str | None) -> tuple[str, str | None]:
    """(checkpoint directory, tag) for what a user gave: a directory, or a tag folder itself. Tag None: implied."""
    path = path.rstrip("/") or "/"
    if tag is None and is_tag_folder(storage, path):
        real = os.path.realpath(path)
        return os.path.dirname(real), os.path.basename(real)
    return path, None if tag is None else check_tag(tag)


def candidates(storage: Storage, directory: str) -> Iterator[str]:
    """Tags to try when none was named: `latest` first, then the committed ones, newest first."""
    latest = read_latest(storage, directory)
    if latest is not None:
        yield latest
    for info in reversed(list_tags(storage, directory)):
        if info.name != latest:
            yield info.name


def check_files(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Every listed file is there and has its length. Raises `CorruptShardError`; reads no data."""
    there = {entry.name: entry.nbytes for entry in storage.list(folder)}
    for name, record in manifest.files.items():
        found = there.get(name)
        if found != record.nbytes:
            text = "it is missing" if found is None else f"{found} bytes found"
            raise CorruptShardError(
                f"{folder}/{name}: {record.nbytes} bytes expected, {text}. Restore the file, or load another tag."
            )


@dataclass(frozen=True, slots=True)
class Found:
    """A committed checkpoint whose files have their lengths. `problems`: why newer ones were passed over."""

    folder: str
    manifest: Manifest
    problems: tuple[str, ...] = ()


def find_checkpoint(storage: Storage, path: str, tag: str | None = None) -> Found:
    """A checkpoint directory's `tag`, or a tag folder given directly; `path` is absolute.

    Without a tag: what `latest` names; when that is missing or damaged, the newest one whose manifest and file lengths
    verify. Raises `CheckpointNotFoundError`, `CorruptCheckpointError` or `FormatVersionError`.
    """
    directory, named = locate(storage, path, tag)
    if named is not None:
        return _check(storage, f"{directory}/{named}", [])
    problems: list[str] = []
    for name in candidates(storage, directory):
        try:
            return _check(storage, f"{directory}/{name}", problems)
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:
            problems.append(str(error))
    raise no_checkpoint(storage, directory, problems)


def _check(storage: Storage, folder: str, problems: Sequence[str]) -> Found:
    manifest = read_manifest(storage, folder)
    check_files(storage, folder, manifest)
    return Found(folder, manifest, tuple(problems))


def fallback_notice(problems: Sequence[str], path: str) -> str:
    return f"falling back to {path}, because newer checkpoints are unusable: {'; '.join(problems)}"


def no_checkpoint(
    storage: Storage, directory: str, problems: Sequence[str]
) -> CheckpointNotFoundError:
    """Says why `directory` gives nothing to open."""
    if _holds_shards([entry.name for entry in storage.list(directory)]):
        return CheckpointNotFoundError(
            f"{directory}: not committed: it holds shard files, but no {MANIFEST_NAME}. Its save did not finish "
            "(or still runs); use another tag."
        )
    why = f" Tried: {'; '.join(problems)}" if problems else ""
    return CheckpointNotFoundError(
        f"{directory}: no committed checkpoint here. Give the checkpoint directory or a tag's folder.{why}"
    )


def _holds_shards(names: Sequence[str]) -> bool:
    """Whether these are files of a save. Exported weights have the same names, and an index beside them."""
    if any(name.endswith(".safetensors.index.json") for name in names):
        return False
    return any(name.endswith(".safetensors") and "-of-" in name for name in names)


def remove_tag(storage: Storage, directory: str, tag: str) -> None:
    """Remove a checkpoint: first the manifest, durably, so that a crash leaves garbage, never a torn checkpoint."""
    folder = f"{directory}/{tag}"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        storage.list(folder)
        storage.remove(f"{folder}/{MANIFEST_NAME}")
        storage.sync(folder)
        storage.remove(folder)
        storage.sync(directory)


def prune(storage: Storage, directory: str, keep_last: int, protected: str) -> list[str]:
    """Remove the oldest committed checkpoints beyond `keep_last`; never `protected`, nor what `latest` names."""
    infos = [info for info in list_tags(storage, directory) if info.manifest is not None]
    spared = {protected, read_latest(storage, directory)}
    doomed = [
        info.name for info in infos[: max(0, len(infos) - keep_last)] if info.name not in spared
    ]
    for name in doomed:
        remove_tag(storage, directory, name)
    return doomed
