"""Removing checkpoints: what stays, and in which order the rest goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.tag_folders import DISK, SHARD, damage_manifest, make_tag
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.retention import prune, remove_tag


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_prune_keeps_the_newest_the_protected_and_what_latest_names(
    keep_last: int, tmp_path: Path
) -> None:
    for step in range(6):
        make_tag(tmp_path, f"t{step}", step)
    (tmp_path / "latest").write_text("t0\n")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / SHARD).touch()
    make_tag(tmp_path, "bad", 9)
    damage_manifest(tmp_path / "bad")
    (tmp_path / "notes").mkdir()
    removed = prune(DISK, str(tmp_path), keep_last, "t1")
    kept = {f"t{step}" for step in range(6 - keep_last, 6)} | {"t0", "t1"}
    assert {p.name for p in tmp_path.iterdir()} == kept | {"latest", "half", "bad", "notes"}
    assert set(removed) == {f"t{step}" for step in range(6)} - kept


class Recording(LocalStorage):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def remove(self, path: str) -> None:
        self.calls.append(f"remove {Path(path).name}")
        super().remove(path)

    def sync(self, path: str) -> None:
        self.calls.append(f"sync {Path(path).name}")
        super().sync(path)


def test_removal_takes_the_manifest_first_and_durably(tmp_path: Path) -> None:
    make_tag(tmp_path, "t1")
    storage = Recording()
    remove_tag(storage, str(tmp_path), "t1")
    name = tmp_path.name
    assert storage.calls == ["remove manifest.json", "sync t1", "remove t1", f"sync {name}"]
    assert not (tmp_path / "t1").exists()
    remove_tag(DISK, str(tmp_path), "t1")  # once more is fine
