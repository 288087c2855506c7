"""Which checkpoint a path means: tags of a directory by age, the newest that is whole, falling back. Imports no torch.

Owns the order in which checkpoints are tried. Promises: what it finds is committed and its files have their lengths;
a tag that was named is that one or an error; why newer ones were passed over is told, never dropped. It may run while
another process saves here, and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zero_ckpt.core.envelope import MANIFEST_REMEDY
from zero_ckpt.core.manifest import MANIFEST_NAME, Manifest, Summary
from zero_ckpt.core.places import resolved
from zero_ckpt.core.shard_file import REMEDY
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import (
    ANOTHER_TAG,
    USE_ANOTHER,
    check_files,
    committed_in,
    contents,
    file_instead,
    holds_shards,
    is_tag_folder,
    names_in,
    nothing_at,
    read_tag,
    shown_tags,
    summarize_tag,
    why_unread,
)
from zero_ckpt.core.tags import LATEST_NAME, LATEST_UNIVERSAL_NAME, look_up_latest, tag_in
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NothingSavedError,
    ZeroCkptError,
)

__all__ = [
    "NOT_COMMITTED",
    "Candidates",
    "Found",
    "TagInfo",
    "fallback_notice",
    "find_checkpoint",
    "list_tags",
    "locate",
    "no_checkpoint",
    "without_advice",
]

NOT_COMMITTED = "not committed"

_LOOKED_INTO = 100
"""How many folders are looked into, to say which of them may have been meant."""


@dataclass(frozen=True, slots=True)
class TagInfo:
    """One tag folder. `summary` is None when it cannot be used; `problem` is then `NOT_COMMITTED`, or the damage."""

    name: str
    summary: Summary | None
    problem: str = ""


def list_tags(storage: Storage, directory: str) -> list[TagInfo]:
    """Every tag folder, oldest first (by step, then time of commit); folders without a manifest come first.

    A folder counts when it holds a manifest or a shard file. Raises `CheckpointNotFoundError` without a directory.
    """
    infos = _tags_there(storage, directory)
    if not any(info.summary for info in infos):
        # A job may have retired all that were listed, which it does when a newer one is there.
        infos = _tags_there(storage, directory)
    return sorted(infos, key=_age)


def _tags_there(storage: Storage, directory: str) -> list[TagInfo]:
    try:
        entries = storage.list(directory)
    except NotADirectoryError as error:
        raise file_instead(
            storage, directory, "a checkpoint directory or a tag's folder"
        ) from error
    except FileNotFoundError as error:
        raise NothingSavedError(
            f"{directory}: no such checkpoint directory; {_beside(storage, directory)}"
        ) from error
    except OSError as error:
        raise CheckpointNotFoundError(
            f"{directory}: cannot be opened as a checkpoint directory: {why_unread(error)}"
        ) from error
    return [info for e in entries if e.is_dir and (info := _inspect(storage, directory, e.name))]


def _age(info: TagInfo) -> tuple[int, float, str]:
    m = info.summary
    return (-1, 0.0, info.name) if m is None else (m.step, m.created, info.name)


def _inspect(storage: Storage, directory: str, name: str) -> TagInfo | None:
    folder = f"{directory}/{name}"
    try:
        return TagInfo(name, summarize_tag(storage, folder))
    except CheckpointNotFoundError:
        return _without_manifest(storage, folder, name)
    except (ZeroCkptError, OSError) as error:
        return TagInfo(name, None, str(error))


def _without_manifest(storage: Storage, folder: str, name: str) -> TagInfo | None:
    """A folder that cannot be listed may be a tag: 'repair' would pass it over, and move `latest` to an older one."""
    try:
        names = [entry.name for entry in storage.list(folder)]
    except (FileNotFoundError, NotADirectoryError):  # it was removed meanwhile
        return None
    except OSError as error:
        return TagInfo(name, None, f"{folder}: cannot be listed: {why_unread(error)}")
    return TagInfo(name, None, NOT_COMMITTED) if holds_shards(names) else None


def locate(storage: Storage, path: str, tag: str | None) -> tuple[str, str | None]:
    """(checkpoint directory, tag) for what a user gave: a directory, or a tag folder itself.

    The tag is None when the user named none, so that `latest` or the newest one is meant.
    """
    path = path.rstrip("/") or "/"
    if tag is None and is_tag_folder(storage, path):
        real = resolved(path)
        return os.path.dirname(real), os.path.basename(real)
    return path, None if tag is None else tag_in(storage, path, tag)


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
    return Candidates(storage, directory).next()


class Candidates:
    """The checkpoints to try when no tag was named: what `latest` names, then all others, newest first."""

    def __init__(self, storage: Storage, directory: str) -> None:
        self._storage, self._directory = storage, directory
        self._problems: list[str] = []
        self._damaged = False
        self._latest, problem = look_up_latest(storage, directory)
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
                self._damaged |= name == self._latest and holds_shards(
                    names_in(self._storage, folder)
                )
        if self._is_overtaken():
            return self.next()
        if self._damaged:
            raise CorruptCheckpointError(
                f"{self._directory}: no checkpoint here is whole: {_joined(self._problems)}. {self._advice()}"
            )
        raise no_checkpoint(self._storage, self._directory, self._problems)

    def _advice(self) -> str:
        if any(MANIFEST_NAME in problem for problem in self._problems):
            return (
                f"'zero-ckpt repair {self._directory}' rebuilds manifests where all else is whole."
            )
        return "Restore the files from a copy."

    def _is_overtaken(self) -> bool:
        """Whether a save has moved `latest` since, and may have retired what was there: then all begins anew."""
        latest, _ = look_up_latest(self._storage, self._directory)
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
    return "; ".join(map(without_advice, problems))


def without_advice(problem: str) -> str:
    """What is wrong with one checkpoint, without what to do about it, which does not hold where it stands in a list."""
    for advice in (ANOTHER_TAG, REMEDY, MANIFEST_REMEDY, USE_ANOTHER):
        problem = problem.removesuffix(advice)
    return problem.rstrip(". ")


def no_checkpoint(
    storage: Storage, directory: str, problems: Sequence[str] = ()
) -> CheckpointNotFoundError:
    """An error that says why `directory` holds nothing to open. `problems`: of the checkpoints that were tried."""
    names = names_in(storage, directory)
    if holds_shards(names):
        return nothing_at(storage, directory)
    was_there = {LATEST_NAME, LATEST_UNIVERSAL_NAME} & set(names)
    kind = CheckpointNotFoundError if was_there else NothingSavedError
    why = f" Tried: {_joined(problems)}" if problems and LATEST_NAME in names else ""
    unfinished = [n for n in names if holds_shards(names_in(storage, f"{directory}/{n}"))]
    if unfinished:
        return kind(
            f"{directory}: no committed checkpoint here, only shard files without {MANIFEST_NAME} in "
            f"{shown_tags(unfinished)}: saves that did not finish, or still run, or whose {MANIFEST_NAME} was deleted. "
            f"Where all shard files are there, 'zero-ckpt repair {directory}' rebuilds it.{why}"
        )
    below = [n for n in names[:_LOOKED_INTO] if committed_in(storage, f"{directory}/{n}")]
    if below:
        return kind(
            f"{directory}: no committed checkpoint here, but checkpoint directories: {shown_tags(below)}. Give one of "
            f"these.{why}"
        )
    return kind(
        f"{directory}: no committed checkpoint here, it {contents(storage, directory)}. Give the checkpoint directory "
        f"or a tag's folder.{why}"
    )


def _beside(storage: Storage, directory: str) -> str:
    """What lies beside a directory that is not there, and what to give instead of it."""
    parent = os.path.dirname(directory)
    return f"{parent} {contents(storage, parent)}. Give the folder that holds the tags"
