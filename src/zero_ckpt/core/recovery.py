"""A lost or damaged manifest, rebuilt from shard files that are whole. Imports no torch.

A set of shard files describes itself: each header places its chunks, and rank 0's `state` file has what else a manifest
says, with a digest of the names, dtypes and shapes of all tensors of the save. So what is rebuilt is all of one save,
or is refused. What only the manifest had (times, versions, placements) is lost; nothing says whether the save had been
committed, but every byte of it is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import xxhash

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.layout import ROLES
from zero_ckpt.core.manifest import MANIFEST_NAME, Manifest, parse_shard_name
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.runs import encode_runs, runs_coverage_error
from zero_ckpt.core.shard_reader import ShardReader, open_shard
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import DAMAGED_NAME
from zero_ckpt.core.verification import Verifier, cause_unread
from zero_ckpt.errors import CorruptCheckpointError, CorruptManifestError, CorruptShardError

__all__ = ["content_digest", "quarantine", "rebuild"]

_Tensors = Mapping[str, Mapping[str, Placed]]

_OBJECTS = "objects.json"


def content_digest(header: Mapping[str, Any], tensors: _Tensors) -> str:
    """Identifies a save's header, and the names, dtypes and global shapes of all its tensors.

    XXH3-128 of the header as JSON, and of one line for each tensor, by role and key.
    """
    hasher = xxhash.xxh3_128(f"{json.dumps(header, sort_keys=True)}\n".encode())
    for role in ROLES:
        for key, placed in sorted(tensors[role].items()):
            hasher.update(
                f"{role} {placed.dtype} {list(placed.shape)} {json.dumps(key)}\n".encode()
            )
    return hasher.hexdigest()


def rebuild(storage: Storage, folder: str) -> Manifest:
    """The manifest of the newest save in `folder` whose files are all there and whole; every byte is verified.

    Raises `CorruptCheckpointError` with what is wrong of each save that left files there; its cause is an OSError if
    one of them could not be read.
    """
    names = [entry.name for entry in storage.list(folder)]
    problems: list[str] = []
    unread: OSError | None = None
    for (generation, world_size), files in sorted(_saves(names).items(), reverse=True):
        try:
            return _rebuild(storage, folder, generation, world_size, files)
        except CorruptCheckpointError as error:
            problems.append(str(error))
            unread = unread or cause_unread(error)
    found = "; ".join(problem.rstrip(".") for problem in problems) or "no shard files there"
    raise CorruptCheckpointError(f"{folder}: the manifest cannot be rebuilt: {found}") from unread


def quarantine(storage: Storage, folder: str) -> None:
    """Put a manifest aside, so that its checkpoint is none any more: no load tries it. The shard files stay."""
    path = f"{folder}/{MANIFEST_NAME}"
    storage.put(f"{folder}/{DAMAGED_NAME}", storage.get(path, 1 << 30))
    storage.remove(path)
    storage.sync(folder)


def _saves(names: Sequence[str]) -> dict[tuple[int, int], list[str]]:
    """(generation, world size) -> the shard files of that save."""
    saves: dict[tuple[int, int], list[str]] = {}
    for name in sorted(names):
        if (parsed := parse_shard_name(name)) is not None:
            _, _, world_size, generation = parsed
            saves.setdefault((generation, world_size), []).append(name)
    return saves


def _rebuild(
    storage: Storage, folder: str, generation: int, world_size: int, names: Sequence[str]
) -> Manifest:
    with ExitStack() as stack:
        readers = []
        for name in names:
            readers.append(open_shard(storage, f"{folder}/{name}", None, name))
            stack.callback(readers[-1].close)
        header = _header(readers)
        _check_ranks(readers, world_size)
        tensors = _tensors(readers)
    told = header.pop("content", None)
    if told != content_digest(header, tensors):
        raise CorruptShardError(
            f"world size {world_size}: its {len(names)} shard files do not hold all tensors of the save, or not under "
            "their names: a file is missing, or a header is damaged"
        )
    manifest = Manifest(
        tag=readers[0].metadata["tag"],
        world_size=world_size,
        generation=generation,
        created=round(time.time(), 3),
        files={reader.name: reader.record for reader in readers},
        tensors=tensors,
        **header,
    )
    _check(storage, folder, manifest)
    return manifest


def _header(readers: Sequence[ShardReader]) -> dict[str, Any]:
    """The manifest's fields that rank 0's state file holds. All files must be of one step of one tag."""
    saves = {(r.metadata.get("tag"), r.metadata.get("step")) for r in readers}
    if len(saves) > 1:
        raise CorruptShardError(f"shard files of different saves: {sorted(map(str, saves))}")
    first = next((r for r in readers if r.name.startswith("state-00000-")), None)
    if first is None or "manifest" not in first.metadata:
        raise CorruptShardError("rank 0's state file is missing, which says what belongs together")
    try:
        header = dict(json.loads(first.metadata["manifest"]))
    except (ValueError, TypeError) as error:
        raise CorruptShardError(f"{first.name}: its header is damaged ({error!r})") from error
    return header


def _check_ranks(readers: Sequence[ShardReader], world_size: int) -> None:
    """Every rank has written a state file, if only to say that it has nothing of its own."""
    found = {int(r.name.split("-")[1]) for r in readers if r.name.startswith("state-")}
    lost = next((rank for rank in range(world_size) if rank not in found), None)
    if lost is not None:
        raise CorruptShardError(
            f"the state file of rank {lost} is missing, which holds what only that rank has"
        )


def _tensors(readers: Sequence[ShardReader]) -> dict[str, dict[str, Placed]]:
    """role -> key -> where its chunks are, without the entries that each rank keeps for itself."""
    found: dict[str, dict[str, list[tuple[int, Box]]]] = {role: {} for role in ROLES}
    kinds: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    shared = _held_together(readers)
    for reader in readers:
        role, rank = reader.name.split("-")[:2]
        for chunk in reader.chunks:
            if role == "state" and chunk.key not in shared:
                continue
            kind = kinds.setdefault((role, chunk.key), (chunk.dtype, chunk.shape))
            if kind != (chunk.dtype, chunk.shape):
                raise CorruptShardError(f"{reader.name}: tensor '{chunk.key}' is another elsewhere")
            found[role].setdefault(chunk.key, []).append((int(rank), chunk.box))
    return {
        role: {key: _placed(key, *kinds[role, key], chunks) for key, chunks in keys.items()}
        for role, keys in found.items()
    }


def _placed(key: str, dtype: str, shape: tuple[int, ...], chunks: list[tuple[int, Box]]) -> Placed:
    runs = encode_runs(sorted(chunks, key=lambda chunk: (chunk[0], chunk[1].offset)))
    if error := runs_coverage_error(shape, runs):
        raise CorruptShardError(f"tensor '{key}' of shape {list(shape)}: {error}")
    return Placed(dtype, shape, runs)


def _held_together(readers: Sequence[ShardReader]) -> frozenset[str]:
    """Names of the objects' tensors that all ranks hold in part."""
    names: set[str] = set()
    for reader in readers:
        if any(chunk.key == _OBJECTS for chunk in reader.chunks):
            try:
                names.update(_named(json.loads(reader.read_entry(_OBJECTS))))
            except (ValueError, RecursionError) as error:
                raise CorruptShardError(f"{reader.name}: {_OBJECTS} is no JSON") from error
    return frozenset(names)


def _named(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if isinstance(name := tree.get("$dtensor"), str):
            yield name
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from _named(item)


def _check(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Read every block, and see that a reader would believe the manifest."""
    with Verifier(storage) as verifier:
        damage = list(verifier.damage(folder, manifest))
    if damage:
        raise CorruptShardError("; ".join(damage)) from verifier.unread
    try:
        Manifest.from_bytes(manifest.to_bytes())
    except CorruptManifestError as error:
        raise CorruptShardError(f"the files do not fit each other: {error}") from error
