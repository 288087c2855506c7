"""Tag folders for tests: committed checkpoints without data."""

from __future__ import annotations

from pathlib import Path

from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.manifest import FileRecord, Manifest, shard_name

DISK = LocalStorage()
SHARD = shard_name("state", 0, 1, 1)


def make_tag(directory: Path, tag: str, step: int = 1, created: float = 0.0) -> Path:
    """A committed checkpoint of one file whose content nobody looks at."""
    folder = directory / tag
    folder.mkdir(parents=True)
    (folder / SHARD).write_bytes(b"12345678")
    files = {SHARD: FileRecord(8, "0" * 32)}
    manifest = Manifest(tag, step, 1, 0, created=created, files=files)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return folder


def damage_manifest(folder: Path) -> None:
    data = bytearray((folder / "manifest.json").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "manifest.json").write_bytes(data)
