"""Tags and `latest`: names of checkpoints in a checkpoint directory, and how one is found. Imports no torch.

A tag is a folder of the checkpoint directory. It is a checkpoint once its manifest verifies; anything else in the
directory is left alone. `latest` is a file that holds one tag's name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zero_ckpt.core.foreign import ForeignManifest, format_of
from zero_ckpt.core.manifest import MANIFEST_NAME, Manifest, Summary
from zero_ckpt.core.places import resolved
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    CorruptManifestError,
    CorruptShardError,
    NothingSavedError,
    ZeroCkptError,
)

__all__ = [
    "LATEST_NAME",
    "NOT_COMMITTED",
    "Candidates",
    "Found",
    "TagInfo",
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
    "read_tag",
    "remove_tag",
]

LATEST_NAME = "latest"
LATEST_UNIVERSAL_NAME = "latest_universal"
"""DeepSpeed's; looked at where there is no `latest`."""

NOT_COMMITTED = "not committed"
MAX_MANIFEST = 1 << 30
"""Bytes. Larger manifests are refused: nothing that reads one may be made to fill the memory."""


@dataclass(frozen=True, slots=True)
class TagInfo:
    """One tag folder. `summary` is None when it cannot be used; `problem` is then `NOT_COMMITTED`, or the damage."""

    name: str
    summary: Summary | None
    problem: str = ""


def check_tag(tag: object) -> str:
    """The tag as a string. Raises `ConfigurationError` for one that a path or a file system would misread."""
    name = str(tag)
    encoded = name.encode(errors="replace")
    bad = (
        set(name) & set("/\\\0\n\r")
        or name in ("", ".", "..", LATEST_NAME, f"{LATEST_NAME}.tmp")
        or len(encoded) > 200
        or encoded.decode() != name
    )
    if bad or name != name.strip() or name.startswith("-"):
        raise ConfigurationError(
            f"tag {name!r} cannot be a folder's name: expected 1 to 200 bytes of UTF-8 without slashes, line breaks, "
            f"surrounding spaces or a leading '-', and not '{LATEST_NAME}', '.' or '..'"
        )
    return name


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """The verified manifest of a tag folder.

    Raises `CheckpointNotFoundError` when there is none, `CorruptManifestError` or `FormatVersionError` otherwise.
    """
    data, path = _manifest_bytes(storage, folder)
    return Manifest.from_bytes(data, path)


def _manifest_bytes(storage: Storage, folder: str) -> tuple[bytes, str]:
    """The content of a folder's manifest, not yet checked, and its path."""
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        data = storage.get(path, MAX_MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _none_at(storage, folder) from error
    except (OSError, ValueError) as error:
        raise CorruptManifestError(f"{path}: cannot be read: {_reason(error)}") from error
    return data, path


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
    """What a list of tags takes of `read_tag`: a manifest's checksum is verified, its tensors are not read."""
    try:
        return Summary.from_bytes(*_manifest_bytes(storage, folder))
    except CheckpointNotFoundError as error:
        return _read_foreign(storage, folder, error)


def _read_foreign(storage: Storage, folder: str, error: CheckpointNotFoundError) -> Manifest:
    """Another system's checkpoint in a folder without a manifest. Raises `error` when there is none."""
    found = format_of(_names(storage, folder))
    if found is None:
        raise error
    return found.open_tag(storage, folder)


def _none_at(storage: Storage, folder: str) -> CheckpointNotFoundError:
    """Says what `folder`, which holds no manifest, is instead of a checkpoint."""
    try:
        names = [entry.name for entry in storage.list(folder)]
    except NotADirectoryError:
        return CheckpointNotFoundError(
            f"{folder}: a file, where a checkpoint's folder was expected"
        )
    except FileNotFoundError:
        directory = os.path.dirname(folder)
        return NothingSavedError(
            f"{folder}: no such checkpoint; {directory} {_shown(storage, directory)}"
        )
    except OSError as error:
        return CheckpointNotFoundError(f"{folder}: cannot be opened: {_reason(error)}")
    if _holds_shards(names):
        return CheckpointNotFoundError(
            f"{folder}: not committed: it holds shard files, but no {MANIFEST_NAME}. Its save did not finish, or "
            "still runs, or that file was deleted; use another tag"
        )
    return CheckpointNotFoundError(
        f"{folder}: not a zero_ckpt checkpoint: no {MANIFEST_NAME} there, it {_shown(storage, folder)}"
    )


def _reason(error: Exception) -> str:
    """Why a file could not be read. The caller names it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is no text" if isinstance(error, UnicodeDecodeError) else str(error)


def _shown(storage: Storage, folder: str) -> str:
    """A few words on what is in a folder."""
    try:
        names = [entry.name for entry in storage.list(folder)]
    except OSError:
        return "does not exist"
    shown = ", ".join(f"'{name}'" for name in names[:4]) + (" ..." if len(names) > 4 else "")
    return f"holds {shown}" if names else "is empty"


def is_tag_folder(storage: Storage, path: str) -> bool:
    """Whether `path` itself holds a checkpoint, readable or not: a manifest, or another system's files."""
    names = _names(storage, path)
    return MANIFEST_NAME in names or format_of(names) is not None


def read_latest(storage: Storage, directory: str) -> str | None:
    """The tag that `latest` names, or None when there is no such file or it is empty or unusable."""
    return _latest(storage, directory)[0]


def _latest(storage: Storage, directory: str) -> tuple[str | None, str]:
    """The tag that `latest` names, or None and what is wrong with the file."""
    path = f"{directory}/{LATEST_NAME}"
    try:
        text = _latest_text(storage, directory)
        return _checked_tag(storage, directory, text.strip()), ""
    except FileNotFoundError:
        return None, f"{path} is missing"
    except ConfigurationError:
        return None, f"{path} names no tag, it holds {text[:40]!r}"
    except (OSError, ValueError) as error:
        return None, f"{path} cannot be read: {_reason(error)}"


def _latest_text(storage: Storage, directory: str) -> str:
    try:
        return storage.get(f"{directory}/{LATEST_NAME}", 4096).decode()
    except FileNotFoundError:
        return storage.get(f"{directory}/{LATEST_UNIVERSAL_NAME}", 4096).decode()


def _checked_tag(storage: Storage, directory: str, tag: str) -> str:
    """The tag. DeepSpeed lets one be a path below the directory: that is taken where such a checkpoint is there."""
    try:
        return check_tag(tag)
    except ConfigurationError:
        parts = tag.split("/")
        is_path = len(parts) > 1 and all(part and part not in (".", "..") for part in parts)
        if is_path and format_of(_names(storage, f"{directory}/{tag}")) is not None:
            return tag
        raise


def list_tags(storage: Storage, directory: str) -> list[TagInfo]:
    """Every tag folder, oldest first (by step, then time of commit); folders without a manifest come first.

    A folder counts when it holds a manifest or a shard file. Raises `CheckpointNotFoundError` without a directory.
    """
    try:
        entries = storage.list(directory)
    except NotADirectoryError as error:
        raise CheckpointNotFoundError(
            f"{directory}: a file, where a checkpoint directory or a tag's folder was expected"
        ) from error
    except FileNotFoundError as error:
        raise NothingSavedError(f"{directory}: no such checkpoint directory") from error
    except OSError as error:
        raise CheckpointNotFoundError(
            f"{directory}: cannot be opened as a checkpoint directory: {_reason(error)}"
        ) from error
    infos = [info for e in entries if e.is_dir and (info := _inspect(storage, directory, e.name))]
    return sorted(infos, key=_age)


def _age(info: TagInfo) -> tuple[int, float, str]:
    m = info.summary
    return (-1, 0.0, info.name) if m is None else (m.step, m.created, info.name)


def _inspect(storage: Storage, directory: str, name: str) -> TagInfo | None:
    folder = f"{directory}/{name}"
    try:
        return TagInfo(name, summarize_tag(storage, folder))
    except CheckpointNotFoundError:
        holds = _holds_shards(_names(storage, folder))
        return TagInfo(name, None, NOT_COMMITTED) if holds else None
    except (ZeroCkptError, OSError) as error:
        return TagInfo(name, None, str(error))


def locate(storage: Storage, path: str, tag: str | None) -> tuple[str, str | None]:
    """(checkpoint directory, tag) for what a user gave: a directory, or a tag folder itself. Tag None: implied."""
    path = path.rstrip("/") or "/"
    if tag is None and is_tag_folder(storage, path):
        real = resolved(path)
        return os.path.dirname(real), os.path.basename(real)
    return path, None if tag is None else _checked_tag(storage, path, tag)


def check_files(storage: Storage, folder: str, manifest: Summary) -> None:
    """Every listed file is there and has its length. Raises `CorruptCheckpointError`; reads no data.

    Of another system's checkpoint that was found out when it was opened.
    """
    if isinstance(manifest, ForeignManifest):
        return
    try:
        there = {entry.name: entry.nbytes for entry in storage.list(folder)}
    except OSError as error:
        raise CorruptCheckpointError(f"{folder}: cannot be read: {_reason(error)}") from error
    for name, record in manifest.files.items():
        found = there.get(name)
        if found != record.nbytes:
            text = "no such file" if found is None else f"{found} bytes"
            raise CorruptShardError(
                f"{folder}/{name}: {record.nbytes} bytes expected, {text} found. Restore the file, or load another tag."
            )


@dataclass(frozen=True, slots=True)
class Found:
    """A committed checkpoint whose files have their lengths. `problems`: why newer ones were passed over."""

    folder: str
    manifest: Manifest
    problems: tuple[str, ...] = ()


class Candidates:
    """The checkpoints to try when no tag was named: what `latest` names, then all others, newest first."""

    def __init__(self, storage: Storage, directory: str) -> None:
        self._storage, self._directory = storage, directory
        self._problems: list[str] = []
        self._damaged = False
        self._latest, problem = _latest(storage, directory)
        self._problems += filter(None, [problem])
        self._names = self._in_order()

    def next(self) -> Found:
        """The next one whose manifest and file lengths verify.

        Raises `FormatVersionError`; at the end `CorruptCheckpointError`, or `CheckpointNotFoundError` when there was
        none to begin with.
        """
        for name in self._names:
            folder = f"{self._directory}/{name}"
            try:
                return _check(self._storage, folder, self._problems)
            except CorruptCheckpointError as error:
                self.reject(error)
            except CheckpointNotFoundError as error:
                self._problems.append(str(error))
                # It was committed once: `latest` moves only after a commit.
                self._damaged |= name == self._latest and _holds_shards(
                    _names(self._storage, folder)
                )
        if self._is_overtaken():
            return self.next()
        if self._damaged:
            raise CorruptCheckpointError(
                f"{self._directory}: no checkpoint here is whole: {_joined(self._problems)}"
            )
        raise no_checkpoint(self._storage, self._directory, self._problems)

    def _is_overtaken(self) -> bool:
        """Whether a save has moved `latest` since, and may have retired what was there: then all begins anew."""
        latest, _ = _latest(self._storage, self._directory)
        if latest is None or latest == self._latest:
            return False
        self._latest, self._problems, self._damaged = latest, [], False
        self._names = self._in_order()
        return True

    def reject(self, error: CorruptCheckpointError) -> None:
        """The one that `next` gave last turned out to be damaged."""
        self._problems.append(str(error))
        self._damaged = True

    def _in_order(self) -> Iterator[str]:
        if self._latest is not None:
            yield self._latest
        for info in reversed(list_tags(self._storage, self._directory)):
            if info.name != self._latest:
                yield info.name


def find_checkpoint(storage: Storage, path: str, tag: str | None = None) -> Found:
    """A checkpoint directory's `tag`, or a tag folder given directly; `path` is absolute.

    Without a tag: what `latest` names; when that is missing or damaged, the newest one whose manifest and file lengths
    verify. Raises `CheckpointNotFoundError`, `CorruptCheckpointError` or `FormatVersionError`.
    """
    directory, named = locate(storage, path, tag)
    if named is not None:
        return _check(storage, f"{directory}/{named}", [])
    return Candidates(storage, directory).next()


def _check(storage: Storage, folder: str, problems: Sequence[str]) -> Found:
    while True:
        manifest = read_tag(storage, folder)
        try:
            check_files(storage, folder, manifest)
        except CorruptCheckpointError:
            if read_tag(storage, folder) == manifest:
                raise
            continue  # it was overwritten between the two looks
        return Found(folder, manifest, tuple(problems))


def fallback_notice(problems: Sequence[str], path: str) -> str:
    return f"falling back to {path}, because {_joined(problems)}"


def _joined(problems: Sequence[str]) -> str:
    return "; ".join(problem.rstrip(".") for problem in problems)


def no_checkpoint(
    storage: Storage, directory: str, problems: Sequence[str] = ()
) -> CheckpointNotFoundError:
    """Says why `directory` gives nothing to open."""
    names = _names(storage, directory)
    if _holds_shards(names):
        return _none_at(storage, directory)
    was_there = {LATEST_NAME, LATEST_UNIVERSAL_NAME} & set(names)
    kind = CheckpointNotFoundError if was_there else NothingSavedError
    why = f" Tried: {_joined(problems)}" if LATEST_NAME in names else ""
    return kind(
        f"{directory}: no committed checkpoint here, it {_shown(storage, directory)}. Give the checkpoint directory or "
        f"a tag's folder.{why}"
    )


def _names(storage: Storage, folder: str) -> list[str]:
    """Names in a folder; none when there is no such folder."""
    try:
        return [entry.name for entry in storage.list(folder)]
    except OSError:
        return []


def _holds_shards(names: Sequence[str]) -> bool:
    """Whether these are files of a save. Exported weights have the same names, and an index beside them."""
    if any(name.endswith(".safetensors.index.json") for name in names):
        return False
    return any(name.endswith(".safetensors") and "-of-" in name for name in names)


def remove_tag(storage: Storage, directory: str, tag: str) -> None:
    """Remove a checkpoint: first the manifest, durably, so that a crash leaves garbage, never a torn checkpoint.

    Of a link to a checkpoint only the link is removed.
    """
    folder = f"{directory}/{tag}"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if any(entry.name == tag and entry.is_dir for entry in storage.list(directory)):
            storage.remove(f"{folder}/{MANIFEST_NAME}")
            storage.sync(folder)
        storage.remove(folder)
        storage.sync(directory)


def _is_ours(storage: Storage, directory: str, info: TagInfo) -> bool:
    return (
        info.summary is not None and format_of(_names(storage, f"{directory}/{info.name}")) is None
    )


def prune(storage: Storage, directory: str, keep_last: int, protected: str) -> list[str]:
    """Remove the oldest committed checkpoints beyond `keep_last`; never `protected`, nor what `latest` names.

    Checkpoints of other systems, and folders that hold one beside ours, neither count nor are removed.
    """
    infos = [info for info in list_tags(storage, directory) if _is_ours(storage, directory, info)]
    spared = {protected, read_latest(storage, directory)}
    doomed = [
        info.name for info in infos[: max(0, len(infos) - keep_last)] if info.name not in spared
    ]
    for name in doomed:
        remove_tag(storage, directory, name)
    return doomed
