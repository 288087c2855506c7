from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cli.conftest import Command, flip
from zero_ckpt import Checkpointer
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.manifest import MANIFEST_NAME, Manifest
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.storage import FileReader
from zero_ckpt.core.tag_folder import read_manifest
from zero_ckpt.core.verification import Verifier


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A tag with one file of four blocks."""
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.full((2 * BLOCK // 4 - 64,), 1.5)) for name in ("a", "b")}
    )
    with Checkpointer(model) as checkpointer:
        checkpointer.save_checkpoint(tmp_path / "large", "t", step=1)
    return tmp_path / "large" / "t"


def test_an_intact_directory_is_verified_tag_by_tag(sharded: Path, command: Command) -> None:
    result = command("verify", sharded)
    assert (result.status, result.err) == (0, "")
    assert [line.split(",")[0] for line in result.lines[:2]] == [
        f"{sharded}/global_step100: ok",
        f"{sharded}/global_step200: ok",
    ]
    assert result.lines[2].startswith("no damage")


def test_every_flipped_bit_of_a_shard_file_is_found(sharded: Path, command: Command) -> None:
    folder = sharded / "global_step100"
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        for offset in {*range(16), *range(16, size, 701), *range(size - 9, size)}:
            flip(path, offset)
            result = command("verify", folder)
            assert result.status == 1, f"{path.name}: byte {offset}"
            assert result.lines[0].startswith(f"{path}: ")
            assert len(result.lines) == 2, result.out
            flip(path, offset)
    assert command("verify", folder).status == 0


def test_every_flipped_bit_of_a_manifest_is_found(sharded: Path, command: Command) -> None:
    folder = sharded / "global_step100"
    path = folder / MANIFEST_NAME
    for offset in [*range(80), *range(80, path.stat().st_size, 41), -1, -2, -3]:
        flip(path, offset)
        result = command("verify", folder)
        assert result.status == 1, f"byte {offset}"
        assert result.lines[0].startswith(f"{path}: ")
        flip(path, offset)
    assert command("verify", folder).status == 0


def test_all_damage_is_listed_and_never_stops_the_rest(large: Path, command: Command) -> None:
    (path,) = large.glob("model-*")
    start = path.stat().st_size - 4 * 8 - (4 * BLOCK - 2 * 4 * 64)
    for block in (0, 2, 3):
        flip(path, start + block * BLOCK + 5)
    (large / "state-00000-of-00001.safetensors").unlink()
    result = command("verify", large)
    assert result.status == 1
    damage = [line.removeprefix(f"{large}/") for line in result.lines[:-1]]
    assert [line.split(" ")[1:3] for line in damage[:3]] == [["block", n] for n in "023"]
    assert "tensor 'a'" in damage[0]
    assert "tensor 'b'" in damage[2]
    assert damage[3].startswith("state-00000-of-00001.safetensors: missing")
    assert len(damage) == 4
    assert "zero-ckpt verify" not in result.out


@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "swapped"])
def test_a_file_of_another_length_is_one_line(change: str, sharded: Path, command: Command) -> None:
    folder = sharded / "global_step200"
    path, other = (folder / f"model-0000{rank}-of-00002.safetensors" for rank in (0, 1))
    data = path.read_bytes()
    changed = {"shorter": data[:-8], "longer": data + bytes(8), "empty": b""}
    path.write_bytes(changed.get(change) or (other.read_bytes() if change == "swapped" else b""))
    result = command("verify", sharded)
    assert result.status == 1
    assert result.lines[0] == f"{sharded}/global_step100: ok, 6 files, {_size(result.lines[0])}"
    assert result.lines[1].startswith(f"{path}: ")
    assert result.lines[2].startswith("DAMAGE: 1 line above, in 1 of 2 checkpoints")


def _size(line: str) -> str:
    return line.rpartition(", ")[2]


def test_a_save_that_did_not_commit_is_no_damage(sharded: Path, command: Command) -> None:
    (sharded / "global_step100" / MANIFEST_NAME).unlink()
    result = command("verify", sharded)
    assert result.status == 0
    assert f"{sharded}/global_step100: not committed, skipped" in result.lines
    alone = command("verify", sharded / "global_step100")
    assert (alone.status, alone.out, alone.err.count("\n")) == (2, "", 1)
    assert "did not finish" in alone.err
    assert f"'zero-ckpt repair {sharded}/global_step100'" in alone.err


def test_so_it_is_when_latest_names_one_of_them(sharded: Path, command: Command) -> None:
    for folder in sharded.glob("global_step*"):
        (folder / MANIFEST_NAME).unlink()
    result = command("verify", sharded)
    assert "in 'global_step100', 'global_step200': saves that did not finish" in result.err
    assert "Tried" not in result.err
    inspected = command("inspect", sharded)
    assert f"{sharded}/global_step200: not committed" in inspected.err
    assert f"'zero-ckpt repair {sharded}/global_step200'" in inspected.err


@pytest.mark.parametrize("what", ["verify", "inspect", "export"])
def test_a_directory_whose_only_tags_are_not_committed_names_them_and_the_repair(
    what: str, sharded: Path, command: Command
) -> None:
    (sharded / "latest").unlink()
    for folder in sharded.glob("global_step*"):
        (folder / MANIFEST_NAME).unlink()
    output = [sharded.parent / "out"] if what == "export" else []
    result = command(what, sharded, *output)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "in 'global_step100', 'global_step200': saves that did not finish" in result.err
    assert f"'zero-ckpt repair {sharded}'" in result.err
    assert "Give the checkpoint directory" not in result.err
    assert command("repair", sharded).status == 0
    assert command(what, sharded, *output).status == 0


def test_a_directory_without_any_commit_is_not_called_intact(
    sharded: Path, command: Command
) -> None:
    for folder in sharded.glob("global_step*"):
        (folder / MANIFEST_NAME).unlink()
    result = command("verify", sharded)
    assert (result.status, result.out) == (2, "")


@pytest.mark.parametrize("content", ["gone\n", "", "../elsewhere"])
def test_latest_that_leads_nowhere_is_damage(content: str, sharded: Path, command: Command) -> None:
    (sharded / "latest").write_text(content)
    result = command("verify", sharded)
    assert result.status == 1
    assert result.lines[2].startswith("latest: ")
    (sharded / "latest").unlink()
    assert command("verify", sharded).status == 0


def test_json_lists_damage_by_checkpoint(sharded: Path, command: Command) -> None:
    flip(sharded / "global_step100" / "optim-00000-of-00002.safetensors", 5000)
    result = command("verify", sharded, "--json")
    assert result.status == 1
    first, second = result.document["checkpoints"]
    assert (result.document["ok"], first["ok"], second["ok"]) == (False, False, True)
    (line,) = first["damage"]
    assert line.startswith("optim-00000-of-00002.safetensors: block 0")
    assert second["files"] == 6


def test_a_link_and_a_relative_path_lead_to_the_tag(
    sharded: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.symlink("global_step100", sharded / "last.ckpt")
    monkeypatch.chdir(sharded)
    assert command("verify", "last.ckpt").lines[0].startswith("last.ckpt: ok, 6 files")


class _BadSector(LocalStorage):
    """A disk with one block that cannot be read."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self._offset = offset

    def open(self, path: str) -> FileReader:
        file = super().open(path)
        read_into = file.read_into

        def read_or_fail(offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
            if offset <= self._offset < offset + nbytes:
                raise OSError(errno.EIO, "Input/output error", path)
            read_into(offset, nbytes, buffer, keep)

        file.read_into = read_or_fail  # type: ignore[method-assign]
        return file


def test_a_block_that_cannot_be_read_is_damage_and_the_rest_is_read(large: Path) -> None:
    storage = _BadSector(offset=2 * BLOCK)
    counted: list[int] = []
    with Verifier(storage, counted.append) as verifier:
        manifest = read_manifest(storage, str(large))
        found = list(verifier.damage(str(large), manifest))
    name = "model-00000-of-00001.safetensors"
    assert found == [f"{name}: block 1: cannot be read: Input/output error"]
    assert sum(counted) == manifest.nbytes


def test_a_header_that_disagrees_with_the_manifest_is_damage(
    sharded: Path, command: Command
) -> None:
    folder = sharded / "global_step100"
    manifest = Manifest.from_bytes((folder / MANIFEST_NAME).read_bytes())
    model = manifest.tensors["model"]
    model["norm.extra"] = model.pop("norm.weight")
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    result = command("verify", folder)
    assert result.status == 1
    assert len(result.lines) == 3
    assert all("tensor 'norm.extra'" in line for line in result.lines[:2])


def test_progress_counts_every_byte_also_of_damaged_files(large: Path) -> None:
    storage = LocalStorage()
    manifest = read_manifest(storage, str(large))
    (large / "state-00000-of-00001.safetensors").unlink()
    counted: list[int] = []
    with Verifier(storage, counted.append) as verifier:
        assert len(list(verifier.damage(str(large), manifest))) == 1
    assert sum(counted) == manifest.nbytes
    assert len(counted) > 4


def _meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen to the first tag after its manifest was read and before its files are."""
    verify, events = Verifier.damage, [happens]

    def damage(self: Verifier, folder: str, manifest: Manifest) -> Iterator[str]:
        if events:
            events.pop()()
        return verify(self, folder, manifest)

    monkeypatch.setattr(Verifier, "damage", damage)


def test_a_tag_that_a_running_job_removes_is_no_damage(
    sharded: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    _meanwhile(monkeypatch, lambda: shutil.rmtree(sharded / "global_step100"))
    result = command("verify", sharded)
    assert (result.status, result.err) == (0, "")
    assert result.lines[0] == f"{sharded}/global_step100: removed meanwhile, skipped"


def test_a_tag_that_a_running_job_overwrites_is_verified_as_it_is_now(
    sharded: Path, replicated: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sharded / "global_step100"

    def overwrite() -> None:
        shutil.rmtree(folder)
        shutil.copytree(replicated / "ddp", folder)

    _meanwhile(monkeypatch, overwrite)
    assert command("verify", sharded).status == 0
    flip(folder / "model-00000-of-00002.safetensors", -1)
    assert command("verify", sharded).status == 1


def test_damage_of_latest_alone_is_told_as_that(sharded: Path, command: Command) -> None:
    (sharded / "latest").write_text("gone\n")
    result = command("verify", sharded)
    assert result.status == 1
    assert result.lines[-1].startswith("DAMAGE: 1 line above, in 'latest' (")
