"""Agreement, votes and the commit: what rank 0 decides in the three meetings of a save.

1. agree   same tag and directory on every rank; the generation of the new files; enough free space; who holds what
2. tables  only when ranks hold different tensors: one table for each distinct content
3. vote    every rank wrote its files durably, or why not; then, and only then, the manifest, `latest`, and clean-up

The moment of commit is the atomic replacement of `manifest.json`. Before it, an error on any rank leaves what was there
before; after it, the new checkpoint is whole and durable, and only clean-up remains, which a crash may skip.
"""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from zero_ckpt.core.layout import Table
from zero_ckpt.core.manifest import MANIFEST_NAME, FileRecord, Manifest
from zero_ckpt.core.planner import SavePlan
from zero_ckpt.core.runs import runs_coverage_error
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tags import LATEST_NAME, check_tag, prune, read_manifest
from zero_ckpt.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    DisagreementError,
    FormatVersionError,
    SaveError,
    ZeroCkptError,
)

__all__ = ["Agreement", "Proposal", "Vote", "agree", "commit", "discard"]

TAG_VALIDATION = ("ignore", "warn", "fail")


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one rank brings to the first meeting. `problem`: why this rank cannot save."""

    directory: str
    tag: str
    digest: str
    shared_bytes: int
    private_bytes: int
    problem: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        return json.dumps([getattr(self, n) for n in self.__dataclass_fields__]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Proposal:
        return cls(*json.loads(data))


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks do: `holders` lists, for each distinct table, the ranks that have it, ascending."""

    directory: str
    tag: str
    generation: int
    holders: list[list[int]]
    notice: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps([getattr(self, n) for n in self.__dataclass_fields__]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Agreement:
        return cls(*json.loads(data))

    @property
    def folder(self) -> str:
        return f"{self.directory}/{self.tag}"


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


def agree(storage: Storage, records: Sequence[bytes], tag_validation: str) -> Agreement:
    """Rank 0's answer to the proposals. Raises what all ranks shall raise; makes the tag's folder."""
    proposals = [Proposal.from_bytes(record) for record in records]
    _raise_problems(p.problem for p in proposals)
    first = proposals[0]
    notice = _tag_notice(proposals, tag_validation)
    tag = check_tag(first.tag)
    holders: dict[str, list[int]] = {}
    for rank, proposal in enumerate(proposals):
        holders.setdefault(proposal.digest, []).append(rank)
    shared = sum(proposals[ranks[0]].shared_bytes for ranks in holders.values())
    shared = shared if len(holders) == 1 else max(p.shared_bytes for p in proposals)
    _check_space(storage, first.directory, shared + sum(p.private_bytes for p in proposals))
    generation = _next_generation(storage, f"{first.directory}/{tag}")
    return Agreement(first.directory, tag, generation, list(holders.values()), notice)


def _raise_problems(problems: Any) -> None:
    found = [(rank, problem) for rank, problem in enumerate(problems) if problem]
    if found:
        rank, (name, message) = found[0]
        others = f" (also ranks {[r for r, _ in found[1:]]})" if len(found) > 1 else ""
        raise _typed(name, f"rank {rank}{others}: {message}")


def _typed(name: str, message: str) -> ZeroCkptError:
    from zero_ckpt.errors import by_name

    return by_name(name, message)


def _tag_notice(proposals: Sequence[Proposal], tag_validation: str) -> str:
    """A sentence about ranks that were given another tag or directory than rank 0; raises in mode `fail`."""
    first = proposals[0]
    odd = {
        rank: f"{p.directory}/{p.tag}"
        for rank, p in enumerate(proposals)
        if (p.directory, p.tag) != (first.directory, first.tag)
    }
    if not odd or tag_validation == "ignore":
        return ""
    shown = ", ".join(f"rank {rank}: '{path}'" for rank, path in list(odd.items())[:4])
    message = f"ranks were given different tags or directories: rank 0: '{first.directory}/{first.tag}', {shown}. "
    if tag_validation == "fail":
        raise DisagreementError(
            message
            + "Nothing was written. Pass the same on every rank, or tag_validation='warn' for rank 0's."
        )
    return message + "All ranks save to rank 0's."


def _check_space(storage: Storage, directory: str, needed: int) -> None:
    free = storage.free_bytes(directory)
    if free is not None and needed > free:
        raise SaveError(
            28,
            f"{directory}: the checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. Nothing was "
            "written. Make room, or lower keep_last.",
        )


def _next_generation(storage: Storage, folder: str) -> int:
    """1 for a new tag; one more than the committed generation when the tag is overwritten."""
    try:
        return read_manifest(storage, folder).generation + 1
    except (CorruptCheckpointError, FormatVersionError):
        taken = [_generation_of(entry.name) for entry in storage.list(folder)]
        return max(taken, default=0) + 1
    except ZeroCkptError:
        return 1


def _generation_of(name: str) -> int:
    stem = name.removesuffix(".safetensors")
    tail = stem.rpartition(".g")[2]
    return int(tail) if tail.isdecimal() and tail != stem else 1


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """What rank 0 needs beside the votes. `header`: fields of the manifest that the caller knows."""

    agreement: Agreement
    plan: SavePlan
    header: Mapping[str, Any]
    save_latest: bool
    keep_last: int | None


def commit(storage: Storage, request: CommitRequest, records: Sequence[bytes]) -> Manifest:
    """Check the votes, write the manifest, move `latest`, clean up. Raises `SaveError` when any rank voted no."""
    begin = time.perf_counter()
    votes = [Vote.from_bytes(record) for record in records]
    agreement = request.agreement
    try:
        _raise_problems(vote.error for vote in votes)
        files = {name: record for vote in votes for name, record in vote.files.items()}
        _check_visible(storage, agreement.folder, files)
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
        storage.put(f"{agreement.folder}/{MANIFEST_NAME}", manifest.to_bytes())
    except BaseException:
        discard(storage, agreement, len(votes))
        raise
    _finish(storage, request, manifest)
    return manifest


def _check_visible(storage: Storage, folder: str, files: Mapping[str, FileRecord]) -> None:
    """Every voted file is where rank 0 looks, and as long as its writer says."""
    there = {entry.name: entry.nbytes for entry in storage.list(folder)}
    for name, record in files.items():
        if there.get(name) != record.nbytes:
            raise SaveError(
                f"{folder}/{name}: its rank wrote {record.nbytes} bytes, rank 0 sees "
                f"{there.get(name, 'no such file')}. "
                "The directory must be one file system that all ranks share."
            )


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


def _finish(storage: Storage, request: CommitRequest, manifest: Manifest) -> None:
    """What follows the commit. Its failures cannot undo the checkpoint, so they are warnings."""
    agreement = request.agreement
    try:
        if request.save_latest:
            storage.put(f"{agreement.directory}/{LATEST_NAME}", f"{agreement.tag}\n".encode())
        _remove_superseded(storage, agreement.folder, manifest)
        if request.keep_last is not None:
            prune(storage, agreement.directory, request.keep_last, agreement.tag)
    except OSError as error:
        warnings.warn(
            f"{agreement.folder} is committed and durable, but what follows a commit failed: {error}. "
            f"'{LATEST_NAME}' or older checkpoints may be out of date.",
            stacklevel=2,
        )


def _remove_superseded(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Files of earlier generations, and of saves of this tag that never committed."""
    for entry in storage.list(folder):
        stale = entry.name.endswith(".safetensors") and entry.name not in manifest.files
        if not entry.is_dir and (stale or entry.name == f"{MANIFEST_NAME}.tmp"):
            storage.remove(f"{folder}/{entry.name}")


def discard(storage: Storage, agreement: Agreement, world_size: int) -> None:
    """Remove the files of a save that will not be committed, and a folder that it made. Never raises."""
    with suppress(OSError):
        entries = storage.list(agreement.folder)
        marker = f".g{agreement.generation}." if agreement.generation > 1 else ".safetensors"
        for entry in entries:
            mine = f"-of-{world_size:05d}" in entry.name and marker in entry.name
            if mine and _generation_of(entry.name) == agreement.generation:
                storage.remove(f"{agreement.folder}/{entry.name}")
        if not storage.list(agreement.folder):
            storage.remove(agreement.folder)


def _slowest(votes: Sequence[Vote]) -> dict[str, float]:
    phases = {name for vote in votes for name in vote.timings}
    return {name: round(max(v.timings.get(name, 0.0) for v in votes), 6) for name in sorted(phases)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("zero-ckpt", "torch", "safetensors"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def merged_tables(records: Sequence[bytes], holders: Sequence[Sequence[int]]) -> bytes:
    """Rank 0's answer in the second meeting: each distinct table once, in the order of `holders`."""
    return b"\n".join(records[ranks[0]] for ranks in holders)


def parse_tables(data: bytes) -> list[Table]:
    return [Table.from_bytes(part) for part in data.split(b"\n")]


def check_tag_validation(mode: str) -> str:
    if mode not in TAG_VALIDATION:
        raise ConfigurationError(f"tag_validation must be one of {TAG_VALIDATION}, found {mode!r}")
    return mode
