"""Rewrites manifests and shard files with the checksums that belong to them, so that a lie gets past every checksum."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

Change = Callable[[dict[str, Any]], "bytes | None"]
"""Changes parsed JSON in place, or returns the bytes to write instead of it."""

TAIL = b"\n}\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    data = (folder / "manifest.json").read_bytes()
    body: dict[str, Any] = json.loads(data[data.index(b"\n") + 1 : -len(TAIL)])
    return body


def rewrite_manifest(folder: Path, change: Change) -> None:
    body = read_manifest(folder)
    raw = change(body)
    data = json.dumps(body).encode() if raw is None else raw
    checksum = xxhash.xxh3_128_hexdigest(data)
    head = f'{{"zero_ckpt": 1, "checksum": "{checksum}", "manifest":\n'.encode()
    (folder / "manifest.json").write_bytes(head + data + TAIL)


def rewrite_shard(folder: Path, name: str, change: Change) -> None:
    """Change a shard file's header; the data and the block table stay, the manifest follows."""
    path = folder / name
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    table = entries["__zero_ckpt_blocks__"]["data_offsets"]
    table_bytes = data[8 + length :][table[0] : table[1]]
    raw = change(entries)
    text = json.dumps(entries).encode() if raw is None else raw
    padded = -(-(8 + len(text)) // 4096) * 4096 - 8
    header = struct.pack("<Q", padded) + text.ljust(padded)
    path.write_bytes(header + data[8 + length :])
    rewrite_record(folder, name, xxhash.xxh3_128_hexdigest(header + table_bytes))


def rewrite_record(folder: Path, name: str, checksum: str) -> None:
    """Make the manifest list the file as it now is."""

    def change(body: dict[str, Any]) -> None:
        body["files"][name] = [(folder / name).stat().st_size, checksum]

    rewrite_manifest(folder, change)
