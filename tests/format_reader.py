"""A reader of checkpoints, written from `docs/format.md` alone: it imports nothing of zero_ckpt.

It verifies every checksum. Elements come as numpy void types of their size: this knows bytes, not numbers.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

BLOCK = 4194304
SIZES = {
    **dict.fromkeys(["F64", "I64", "U64", "C64"], 8),
    **dict.fromkeys(["F32", "I32", "U32", "C32"], 4),
    **dict.fromkeys(["F16", "BF16", "I16", "U16"], 2),
    **dict.fromkeys(["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"], 1),
    **dict.fromkeys(["F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4_E2M1X2"], 1),
    "C128": 16,
}
AS_BYTES = {"C128", "C32", "F4_E2M1X2"}
Chunk = tuple[str, list[int], Any]  # element type, global shape, elements


def read_manifest(folder: Path) -> dict[str, Any]:
    first, _, rest = (folder / "manifest.json").read_bytes().partition(b"\n")
    frame = rb'\{"zero_ckpt": (\d+), "checksum": "([0-9a-f]{32})", "manifest":'
    match = re.fullmatch(frame, first)
    assert match is not None
    assert int(match[1]) == 1
    assert rest.endswith(b"\n}\n")
    body = rest[:-3]
    assert xxhash.xxh3_128_hexdigest(body) == match[2].decode()
    manifest: dict[str, Any] = json.loads(body)
    return manifest


def read_shard(path: Path, nbytes: int, checksum: str) -> dict[tuple[str, tuple[int, ...]], Chunk]:
    """(key, offset) -> chunk."""
    content = path.read_bytes()
    assert len(content) == nbytes
    (length,) = struct.unpack("<Q", content[:8])
    assert (8 + length) % 4096 == 0
    header = json.loads(content[8 : 8 + length])
    names = list(header)
    assert (names[0], names[-1]) == ("__metadata__", "__zero_ckpt_blocks__")
    metadata, table = header.pop("__metadata__"), header["__zero_ckpt_blocks__"]
    assert (metadata["format"], metadata["version"]) == ("zero_ckpt", "1")
    assert path.name.startswith(f"{metadata['role']}-{int(metadata['rank']):05d}-of-")
    begins = [entry["data_offsets"][0] for entry in header.values()]
    ends = [entry["data_offsets"][1] for entry in header.values()]
    assert begins == [0, *ends[:-1]]
    start, stop = 8 + length, 8 + length + table["data_offsets"][0]
    data, sums = content[start:stop], content[stop:]
    assert len(data) % 8 == 0
    assert len(content) == start + ends[-1]
    assert table["dtype"] == "U64"
    assert table["shape"] == [-(-len(data) // BLOCK)]
    hasher = xxhash.xxh3_128(content[:start])
    hasher.update(sums)
    assert hasher.hexdigest() == checksum
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    found = [xxhash.xxh3_64_intdigest(block) for block in blocks]
    assert found == list(struct.unpack(f"<{len(found)}Q", sums))
    places = json.loads(metadata["chunks"])
    chunks = dict(_chunks(header, places, data))
    if pad := header.get("__zero_ckpt_pad__"):
        assert data[pad["data_offsets"][0] :] == bytes(*pad["shape"])
    return chunks


def _chunks(header: Any, places: Any, data: bytes) -> Iterator[tuple[Any, Chunk]]:
    for name, entry in header.items():
        if name.startswith("__zero_ckpt_"):
            continue
        place = places.get(name, {})
        dtype = place.get("dtype", entry["dtype"])
        shape = entry["shape"][:-1] if dtype in AS_BYTES else entry["shape"]
        begin, end = entry["data_offsets"]
        assert end - begin == prod(shape) * SIZES[dtype]
        assert begin % SIZES[dtype] == 0
        elements = np.frombuffer(data[begin:end], dtype=f"V{SIZES[dtype]}").reshape(shape)
        offset = tuple(place.get("offset", [0] * len(shape)))
        yield (place.get("key", name), offset), (dtype, place.get("shape", shape), elements)


def run_chunks(run: dict[str, Any]) -> Iterator[tuple[int, list[int], list[int]]]:
    """(rank, offset, shape) of every chunk of a run."""
    count = run.get("count", 1)
    for i in range(count):
        offset, shape = list(run["offset"]), list(run["shape"])
        if count > 1:
            offset[run["dim"]] += i * run["step"]
            if i == count - 1:
                shape[run["dim"]] = run["last"]
        yield run["rank"] + i * run.get("stride", 0), offset, shape


class Reader:
    """All of a checkpoint, verified. `tensors`: role -> key -> (element type, elements)."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.files = {
            name: read_shard(folder / name, *record)
            for name, record in self.manifest["files"].items()
        }
        self.tensors = {
            role: {key: self._tensor(role, key, index) for key, index in keys.items()}
            for role, keys in self.manifest["tensors"].items()
        }

    def file_of(self, role: str, rank: int) -> dict[tuple[str, tuple[int, ...]], Chunk]:
        generation = self.manifest["generation"]
        suffix = f".g{generation}" if generation > 1 else ""
        world_size = self.manifest["world_size"]
        return self.files[f"{role}-{rank:05d}-of-{world_size:05d}{suffix}.safetensors"]

    def _tensor(self, role: str, key: str, index: int) -> tuple[str, Any]:
        layout = self.manifest["layouts"][index]
        dtype, shape = layout["dtype"], layout["shape"]
        whole = np.empty(shape, dtype=f"V{SIZES[dtype]}")
        covered = np.zeros(shape, dtype=int)
        for run in layout["runs"]:
            for rank, offset, extent in run_chunks(run):
                stored, global_shape, elements = self.file_of(role, rank)[key, tuple(offset)]
                assert (stored, global_shape, list(elements.shape)) == (dtype, shape, extent)
                box = tuple(slice(a, a + n) for a, n in zip(offset, extent, strict=True))
                whole[box] = elements
                covered[box] += 1
        assert (covered == 1).all()
        return dtype, whole

    def json(self, rank: int, name: str) -> Any:
        """`objects` or `rank_objects`, as they are encoded."""
        _, _, elements = self.file_of("state", rank)[f"{name}.json", (0,)]
        return json.loads(elements.tobytes())
