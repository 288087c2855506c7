"""Votes and the commit: what rank 0 decides in the last of the three meetings of a save.

1. agree   same tag and directory on every rank; generation of the new files; free space; who holds what (`agreement`)
2. tables  only when ranks hold different tensors: one table for each distinct content
3. vote    every rank wrote its files durably, or why not; then, and only then, the manifest, `latest`, and clean-up

The moment of commit is the atomic replacement of `manifest.json`. Before it, an error on any rank leaves what was there
before; after it, the new checkpoint is whole and durable, and only clean-up remains, which a crash may skip.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from zero_ckpt.core.agreement import Agreement, raise_problems
from zero_ckpt.core.latest import move_latest, notice_of_others
from zero_ckpt.core.layout import ROLES
from zero_ckpt.core.manifest import MANIFEST_NAME, FileRecord, Manifest, shard_name
from zero_ckpt.core.planner import SavePlan
from zero_ckpt.core.retention import prune
from zero_ckpt.core.runs import runs_coverage_error
from zero_ckpt.core.storage import Entry, Storage
from zero_ckpt.core.tag_folder import loose_files, read_manifest
from zero_ckpt.core.tags import LATEST_NAME
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    SaveError,
    ZeroCkptError,
    describe,
)

__all__ = ["CommitRequest", "Vote", "commit", "discard"]


@dataclass(frozen=True, slots=True)
class Vote:
    """A rank's files and timings, or its error as [class name, text]."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    error: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        files = {name: [r.nbytes, r.checksum] for name, r in self.files.items()}
        return json.dumps([files, self.timings, self.error]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Vote:
        files, timings, error = json.loads(data)
        return cls({name: FileRecord(*r) for name, r in files.items()}, timings, error)


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """What rank 0 needs beside the votes.

    `header`: fields of the manifest that the caller knows. `save_latest`, `keep_last`: as in `Checkpointer`. `check`
    raises when this job may not commit any more.
    """

    agreement: Agreement
    plan: SavePlan
    header: Mapping[str, Any]
    save_latest: bool
    keep_last: int | None
    check: Callable[[], None] = lambda: None


def commit(storage: Storage, request: CommitRequest, records: Sequence[bytes]) -> str:
    """Check the votes, write the manifest, move `latest`, clean up. Raises when any rank voted no.

    Returns a notice for the user, or "": what went wrong after the commit, or that another job saves here too.
    """
    begin = time.perf_counter()
    votes = [Vote.from_bytes(record) for record in records]
    agreement = request.agreement
    try:
        request.check()  # before what another job did there shows as damage
        raise_problems(vote.error for vote in votes)
        files = {name: record for vote in votes for name, record in vote.files.items()}
        there = _check_visible(storage, agreement.folder, files)
        manifest = Manifest(
            tag=agreement.tag,
            world_size=len(votes),
            generation=agreement.generation,
            created=round(time.time(), 3),
            files=files,
            tensors=request.plan.roles,
            versions=_versions(),
            timings=_slowest(votes),
            **request.header,
        )
        _check_coverage(manifest)
        storage.sync(agreement.folder)
        manifest.timings["commit"] = round(time.perf_counter() - begin, 6)
        request.check()  # once more, since a job that is stopped here may wake up in another one's directory
        _put_manifest(storage, agreement, manifest)
    except BaseException:
        discard(storage, agreement, range(len(votes)), len(votes))
        raise
    return _finish(storage, request, manifest, there)


def _put_manifest(storage: Storage, agreement: Agreement, manifest: Manifest) -> None:
    try:
        storage.put(f"{agreement.folder}/{MANIFEST_NAME}", manifest.to_bytes())
    except OSError as error:
        if not _is_committed(storage, agreement):
            raise
        raise SaveError(
            f"{agreement.folder}: the manifest is in place, but the disk did not make it durable: {describe(error)}. "
            "The checkpoint loads, but a power failure may undo it. Check the disk, and save again."
        ) from error


def _check_visible(storage: Storage, folder: str, files: Mapping[str, FileRecord]) -> list[Entry]:
    """What is in the folder. Every voted file must be where rank 0 looks, and as long as its writer says."""
    entries: list[Entry] = []
    with suppress(FileNotFoundError):
        entries = storage.list(folder)
    there = {entry.name: entry.nbytes for entry in entries}
    for name, record in files.items():
        if there.get(name) == record.nbytes:
            continue
        found = _opened_length(storage, f"{folder}/{name}")
        if found != record.nbytes:
            seen = "no such file" if found is None else f"{found} bytes"
            raise SaveError(
                f"{folder}/{name}: its rank wrote {record.nbytes} bytes, rank 0 sees {seen}. Nothing was committed. "
                "The directory must be on one file system that all ranks share."
            )
    return entries


def _opened_length(storage: Storage, path: str) -> int | None:
    """A file's length as an open sees it: network file systems list folders from a cache, and open past it."""
    try:
        file = storage.open(path)
    except OSError:
        return None
    nbytes = file.nbytes
    file.close()
    return nbytes


def _check_coverage(manifest: Manifest) -> None:
    for role, keys in manifest.tensors.items():
        checked: set[int] = set()
        for key, placed in keys.items():
            if id(placed) in checked:
                continue
            checked.add(id(placed))
            if error := runs_coverage_error(placed.shape, placed.runs):
                raise SaveError(
                    f"{role} tensor '{key}' of shape {list(placed.shape)}: {error}. Nothing was committed: the ranks "
                    "do not hold the whole tensor between them."
                )


def _finish(
    storage: Storage, request: CommitRequest, manifest: Manifest, there: Sequence[Entry]
) -> str:
    """What follows the commit: `latest`, clean-up, retention. Returns a notice, or "".

    `there`: what lay in the tag's folder just before the commit. Failures here cannot undo the checkpoint, so they are
    told and not raised.
    """
    agreement, notice = request.agreement, ""
    try:
        if request.save_latest:
            notice = notice_of_others(storage, agreement.directory)
            move_latest(storage, agreement.directory, agreement.tag)
        for entry in loose_files(there, manifest.files):
            storage.remove(f"{agreement.folder}/{entry.name}")
        if request.keep_last is not None:
            prune(storage, agreement.directory, request.keep_last, agreement.tag)
    except Exception as error:
        return (
            f"{agreement.folder} is committed and durable, but what follows a commit failed: {describe(error)}. "
            f"'{LATEST_NAME}' or older checkpoints may be out of date."
        )
    return notice


def discard(storage: Storage, agreement: Agreement, ranks: Iterable[int], world_size: int) -> None:
    """Remove what `ranks` wrote for a save that is not committed, and its folder when nothing is left. Never raises.

    Looks at the manifest in place: a save that failed after its commit keeps its files.
    """
    names = {
        shard_name(role, rank, world_size, agreement.generation) for rank in ranks for role in ROLES
    }
    with suppress(OSError):
        if _is_committed(storage, agreement) is not False:
            return
        entries = storage.list(agreement.folder)
        for entry in entries:
            if entry.name in names:
                storage.remove(f"{agreement.folder}/{entry.name}")
        if names.issuperset(entry.name for entry in entries):
            storage.remove(agreement.folder)


def _is_committed(storage: Storage, agreement: Agreement) -> bool | None:
    """Whether the manifest in place is this save's; None when it cannot be read."""
    try:
        return read_manifest(storage, agreement.folder).generation == agreement.generation
    except CheckpointNotFoundError:
        return False
    except (ZeroCkptError, OSError):
        return None


def _slowest(votes: Sequence[Vote]) -> dict[str, float]:
    phases = {name for vote in votes for name in vote.timings}
    return {name: round(max(v.timings.get(name, 0.0) for v in votes), 6) for name in sorted(phases)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("zero-ckpt", "torch", "safetensors"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
