"""The commit record: which files and tensors form a checkpoint. Pure: records <-> bytes, no files, no torch.

`manifest.json` is written last; without it there is no checkpoint. Its bytes lie in an `envelope`, which is verified
before anything in it is believed. Then every number is checked: a sound checksum does not make a manifest true.

Size grows with tensors + ranks: equal tensors share one entry of `layouts`, and chunks are runs (see `runs`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from math import isfinite
from typing import Any, TypeVar

from zero_ckpt.core.dtypes import ITEMSIZE
from zero_ckpt.core.envelope import FORMAT_VERSION, seal, unseal
from zero_ckpt.core.layout import MAX_DIMS, ROLES
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.runs import run_from_json, runs_coverage_error
from zero_ckpt.errors import CorruptManifestError

__all__ = ["MANIFEST_NAME", "FileRecord", "Manifest", "Summary", "parse_shard_name", "shard_name"]

MANIFEST_NAME = "manifest.json"


def shard_name(role: str, rank: int, world_size: int, generation: int) -> str:
    """`model-00000-of-00004.safetensors`; from the second generation on with `.g<generation>`."""
    suffix = f".g{generation}" if generation > 1 else ""
    return f"{role}-{rank:05d}-of-{world_size:05d}{suffix}.safetensors"


_SHARD_NAME = re.compile(r"(model|optim|state)-(\d{5,})-of-(\d{5,})(?:\.g(\d+))?\.safetensors")


def parse_shard_name(name: str) -> tuple[str, int, int, int] | None:
    """(role, rank, world size, generation) of a shard file; None for any other name."""
    match = _SHARD_NAME.fullmatch(name)
    return match and (match[1], int(match[2]), int(match[3]), int(match[4] or 1))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A shard file: length in bytes, and XXH3-128 (hex) of its header and block table."""

    nbytes: int
    checksum: str


@dataclass(slots=True)
class Summary:
    """What a manifest says of a checkpoint as a whole, and its files: enough to list it, not to read it.

    `created`: seconds since the epoch. `generation` counts the overwrites of the tag, from 1.
    """

    tag: str
    step: int
    world_size: int
    zero_stage: int
    generation: int = 1
    created: float = 0.0
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all shard files."""
        return sum(record.nbytes for record in self.files.values())

    @classmethod
    def from_bytes(cls, data: bytes, path: str = MANIFEST_NAME) -> Summary:
        """Parse and check these fields only. Raises `CorruptManifestError` or `FormatVersionError`, naming `path`."""
        body = unseal(data, path)
        return _believed(path, lambda: Summary(**_summary(_head(body))))


@dataclass(slots=True)
class Manifest(Summary):
    """Everything that is known of one checkpoint without opening a shard file.

    `tensors`: role -> key -> where its chunks are. `buffers`, `frozen`: keys of these among the model's tensors.
    `excluded`: frozen parameters that were left out. `aliases`: tied name -> stored key. `timings`: phase -> seconds,
    the slowest rank's.
    """

    tensors: dict[str, dict[str, Placed]] = field(
        default_factory=lambda: {role: {} for role in ROLES}
    )
    buffers: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def file_of(self, role: str, rank: int) -> str:
        return shard_name(role, rank, self.world_size, self.generation)

    def to_bytes(self) -> bytes:
        return seal(_body(self).encode())

    @classmethod
    def from_bytes(cls, data: bytes, path: str = MANIFEST_NAME) -> Manifest:
        """Parse and check everything. Raises `CorruptManifestError` or `FormatVersionError`, naming `path`."""
        body = unseal(data, path)
        return _believed(path, lambda: _parse(json.loads(body)))


T = TypeVar("T")


def _believed(path: str, parse: Callable[[], T]) -> T:
    """What `parse` makes of content whose checksum holds, which does not yet make it a manifest."""
    try:
        return parse()
    except _UNBELIEVABLE as error:
        raise CorruptManifestError(
            f"{path}: the checksum holds, but the content is not a manifest of format {FORMAT_VERSION}: {error}"
        ) from error


def _head(body: bytes) -> Any:
    """The short fields, without parsing the long ones behind them where `_body` wrote this; else all fields."""
    head, found, _ = body.partition(_LAYOUTS)
    if found:
        with suppress(ValueError):
            return json.loads(head + b"}")
    return json.loads(body)


_LAYOUTS = b',\n"layouts": '

_UNBELIEVABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What the code that parses a manifest raises for content that is none."""


def _body(m: Manifest) -> str:
    """Stable JSON, one file and one tensor a line."""
    layouts: dict[Placed, int] = {}
    by_id: dict[int, int] = {}
    index: dict[str, dict[str, int]] = {}
    for role, keys in m.tensors.items():
        index[role] = {}
        for key, placed in keys.items():
            at = by_id.get(id(placed))
            if at is None:
                at = by_id[id(placed)] = layouts.setdefault(placed, len(layouts))
            index[role][key] = at
    scalars = ("tag", "step", "world_size", "zero_stage", "generation", "created")
    parts = [f"{json.dumps(name)}: {json.dumps(getattr(m, name))}" for name in scalars]
    for name in ("versions", "timings", "buffers", "frozen", "excluded", "aliases"):
        parts.append(f"{json.dumps(name)}: {json.dumps(getattr(m, name), sort_keys=True)}")
    files = (f"{quote(n)}: [{r.nbytes}, {quote(r.checksum)}]" for n, r in sorted(m.files.items()))
    parts.append(f'"files": {_lines(files)}')
    parts.append(f'"layouts": {json.dumps([_placed_json(p) for p in layouts])}')
    roles = ",\n".join(
        f"{quote(role)}: {_lines(f'{quote(key)}: {at}' for key, at in keys.items())}"
        for role, keys in index.items()
    )
    parts.append(f'"tensors": {{{roles}}}')
    return "{" + ",\n".join(parts) + "}"


def _lines(rows: Iterable[str]) -> str:
    """A JSON object with one of the given entries a line."""
    text = ",\n".join(rows)
    return f"{{\n{text}\n}}" if text else "{}"


def _placed_json(placed: Placed) -> dict[str, Any]:
    placements = None if placed.placements is None else list(placed.placements)
    return {
        "dtype": placed.dtype,
        "shape": list(placed.shape),
        "placements": placements,
        "runs": [run.to_json() for run in placed.runs],
    }


def _summary(body: Any) -> dict[str, Any]:
    """The fields of a `Summary`."""
    _expect(isinstance(body, dict), "the body is no object")
    counts = {name: body[name] for name in ("step", "world_size", "zero_stage", "generation")}
    for name, value in counts.items():
        _expect(type(value) is int and value >= 0, f"'{name}' is {value!r}")
    _expect(counts["generation"] >= 1, "'generation' is 0")
    _expect(isinstance(body["tag"], str), "'tag' is no string")
    files = {name: _file(name, record) for name, record in body["files"].items()}
    world_size = counts["world_size"]
    # Every rank writes one file at least, so the numbers of ranks are bounded by what was read.
    _expect(1 <= world_size <= len(files), f"{len(files)} files of {world_size} ranks")
    _expect(len(files) <= 3 * world_size, "more files than ranks can write")
    return {"tag": body["tag"], "created": _number(body["created"]), "files": files, **counts}


def _parse(body: Any) -> Manifest:
    summary = _summary(body)
    layouts = [_layout(item, summary["world_size"]) for item in body["layouts"]]
    tensors = {role: _index(body["tensors"][role], layouts) for role in ROLES}
    manifest = Manifest(
        tensors=tensors,
        buffers=_names(body["buffers"]),
        frozen=_names(body["frozen"]),
        excluded=_names(body["excluded"]),
        aliases=_strings(body["aliases"]),
        versions=_strings(body["versions"]),
        timings={name: _number(value) for name, value in body["timings"].items()},
        **summary,
    )
    _check_references(manifest)
    return manifest


def _check_references(manifest: Manifest) -> None:
    """Aliases name stored tensors, runs name listed files, and these are long enough for the tensors."""
    missing = set(manifest.aliases.values()) - manifest.tensors["model"].keys()
    _expect(not missing, f"aliases of tensors that are not there: {sorted(missing)[:3]}")
    for role, keys in manifest.tensors.items():
        files = (manifest.files.get(manifest.file_of(role, r)) for r in range(manifest.world_size))
        lengths = {rank: record.nbytes for rank, record in enumerate(files) if record is not None}
        distinct = {id(placed): placed for placed in keys.values()}
        # A reader makes room for a tensor before it reads it.
        sizes = {key: placed.nbytes for key, placed in distinct.items()}
        needed = sum(sizes[id(placed)] for placed in keys.values())
        there = sum(lengths.values())
        _expect(needed <= there, f"{role} tensors of {needed} bytes in files of {there}")
        rows = {run.ranks() for placed in distinct.values() for run in placed.runs}
        for rank in set().union(*rows) - lengths.keys():
            _expect(False, f"tensors lie in '{manifest.file_of(role, rank)}', which is not listed")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _file(name: str, record: Any) -> FileRecord:
    _expect(parse_shard_name(name) is not None, f"'{name}' is no shard file's name")
    nbytes, checksum = record
    _expect(type(nbytes) is int and nbytes > 0, f"file '{name}' has the length {nbytes!r}")
    _expect(isinstance(checksum, str) and len(checksum) == 32, f"file '{name}' has no checksum")
    return FileRecord(nbytes, checksum)


def _layout(record: Any, world_size: int) -> Placed:
    dtype, shape = record["dtype"], tuple(record["shape"])
    _expect(dtype in ITEMSIZE, f"unknown dtype {dtype!r}")
    sound = len(shape) <= MAX_DIMS and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
    _expect(sound, "a tensor's shape is not made of up to 64 natural numbers")
    runs = tuple(run_from_json(item, shape, world_size) for item in record["runs"])
    if error := runs_coverage_error(shape, runs):
        raise ValueError(f"a tensor of shape {list(shape)}: {error}")
    placements = record["placements"]
    if placements is not None:
        placements = tuple(_names(placements))
    return Placed(dtype, shape, runs, placements)


def _index(keys: Any, layouts: list[Placed]) -> dict[str, Placed]:
    size = len(layouts)
    _expect(
        all(type(i) is int and 0 <= i < size for i in keys.values()), "a tensor names no layout"
    )
    return {key: layouts[i] for key, i in keys.items()}


def _number(value: Any) -> float:
    _expect(type(value) in (int, float) and isfinite(value), f"expected a number, found {value!r}")
    return float(value)


def _names(value: Any) -> list[str]:
    _expect(
        isinstance(value, list) and all(isinstance(v, str) for v in value),
        "expected a list of names",
    )
    return list(value)


def _strings(value: Any) -> dict[str, str]:
    _expect(
        isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
        "expected an object of strings",
    )
    return dict(value)
