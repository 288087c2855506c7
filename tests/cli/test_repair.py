"""`zero-ckpt repair`: what is whole comes back bitwise, and what is not is refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Command, flip
from tests.faults.jobs import contents, files
from tests.faults.lies import read_manifest
from zero_ckpt.cli import repair
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.testing import FaultyStorage, Operation


def lose(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage(folder: Path) -> None:
    flip(folder / "manifest.json", 300)


@pytest.mark.parametrize("harm", [lose, damage])
def test_a_manifest_is_rebuilt_from_whole_shard_files(
    harm: Callable[[Path], None], sharded: Path, command: Command
) -> None:
    folder = sharded / "global_step100"
    before, manifest = contents(folder), read_manifest(folder)
    harm(folder)
    result = command("repair", folder)
    assert (result.status, result.err) == (0, "")
    assert result.lines == [f"{folder}: rebuilt: step 100, {len(manifest['files'])} files"]
    assert contents(folder) == before
    rebuilt = read_manifest(folder)
    for name in (
        "tag",
        "step",
        "world_size",
        "zero_stage",
        "files",
        "aliases",
        "frozen",
        "buffers",
    ):
        assert rebuilt[name] == manifest[name]
    assert (folder / "manifest.json.damaged").exists() is (harm is damage)
    assert command("repair", folder).lines == [f"{folder}: whole"]


def test_what_cannot_be_rebuilt_is_told_without_the_advice_to_rebuild_it(
    sharded: Path, command: Command
) -> None:
    folder = sharded / "global_step100"
    damage(folder)
    flip(folder / "model-00000-of-00002.safetensors", -1)
    [line] = command("repair", folder).lines
    assert "the manifest cannot be rebuilt" in line
    assert "zero-ckpt" not in line


def test_an_overwritten_tag_is_rebuilt_from_its_newest_whole_save(
    sharded: Path, command: Command
) -> None:
    """A later save of the tag has left one file, and never committed."""
    folder = sharded / "global_step100"
    before = contents(folder)
    [name] = [n for n in os.listdir(folder) if n.startswith("model-00000")]
    shutil.copy(folder / name, folder / name.replace(".safe", ".g2.safe"))
    lose(folder)
    assert command("repair", folder).status == 0
    assert contents(folder) == before


def remove_one(folder: Path, role: str) -> None:
    next(iter(sorted(folder.glob(f"{role}-00001-*")))).unlink()


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a model file is missing": (lambda f: remove_one(f, "model"), "are in no chunk"),
    "an optimizer file is missing": (lambda f: remove_one(f, "optim"), "are in no chunk"),
    "all optimizer files are missing": (
        lambda f: [p.unlink() for p in f.glob("optim-*")] and None,
        "a file is missing",
    ),
    "rank 0's state file is missing": (
        lambda f: next(iter(f.glob("state-00000-*"))).unlink(),
        "rank 0's state file is missing",
    ),
    "another rank's state file is missing": (
        lambda f: remove_one(f, "state"),
        "the state file of rank 1 is missing",
    ),
    "a data byte is flipped": (
        lambda f: flip(next(iter(f.glob("model-00001-*"))), 4096 + 8),
        "checksum",
    ),
    "a file of another step": (
        lambda f: (
            shutil.copy(
                next(iter((f.parent / "global_step200").glob("model-00001-*"))),
                next(iter(f.glob("model-00001-*"))),
            )
            and None
        ),
        "shard files of different saves",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_not_all_of_one_save_is_refused_and_left_as_it_is(
    harm: str, sharded: Path, command: Command
) -> None:
    folder = sharded / "global_step100"
    call, text = HARMS[harm]
    call(folder)
    lose(folder)
    left = sorted(os.listdir(folder))
    result = command("repair", folder)
    assert result.status == 1
    assert result.lines[0].startswith(f"{folder}: damaged: no manifest.json; the manifest cannot")
    assert text in result.lines[0]
    assert sorted(os.listdir(folder)) == left


def test_no_flipped_bit_of_a_header_gets_into_a_rebuilt_manifest(
    sharded: Path, command: Command
) -> None:
    """Without a manifest nothing else guards the headers: names, shapes, places and the digest itself."""
    folder = sharded / "global_step100"
    before = contents(folder)
    rebuilt = 0
    for path in sorted(folder.glob("model-*")):
        stop = int.from_bytes(path.read_bytes()[:8], "little") + 8
        text = path.read_bytes()[:stop].rstrip()
        for offset in range(8, len(text), 23):
            lose(folder) if (folder / "manifest.json").exists() else None
            flip(path, offset)
            if command("repair", folder).status == 0:
                rebuilt += 1
                assert contents(folder) == before, f"{path.name}: byte {offset}"
            flip(path, offset)
    assert rebuilt < 10


def test_a_directory_is_repaired_tag_by_tag_and_latest_last(
    sharded: Path, command: Command
) -> None:
    first, second = (sharded / f"global_step{step}" for step in (100, 200))
    before = contents(first)
    lose(first)
    flip(next(iter(second.glob("model-00000-*"))), 4096 + 8)
    result = command("repair", sharded)
    assert result.status == 1
    assert result.lines[0].startswith(f"{first}: rebuilt")
    assert result.lines[1].startswith(f"{second}: damaged: model-00000")
    assert result.lines[2] == f"{sharded}/latest: names 'global_step100' now"
    result = command("repair", sharded, "--quarantine")
    assert result.status == 0
    assert result.lines[1].startswith(f"{second}: quarantined: model-00000")
    assert contents(sharded) == before
    assert not (second / "manifest.json").exists()
    assert command("verify", sharded).status == 0


def test_what_cannot_be_read_just_now_is_not_put_aside(
    sharded: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does `latest` move to an older checkpoint: an hour later the file system may answer again."""
    folder = sharded / "global_step200"
    before = files(sharded)

    def fail(operation: Operation) -> None:
        if operation.path.startswith(f"{folder}/model-00001"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), operation.path)

    storage = FaultyStorage(LocalStorage(), fail, names={"read"})
    with monkeypatch.context() as patch:
        patch.setattr(repair, "AnyStorage", lambda: storage)
        result = command("repair", sharded, "--quarantine")
    assert result.status == 2
    whole, failed = result.lines
    assert whole == f"{sharded / 'global_step100'}: whole"
    assert failed.startswith(f"{folder}: failed: model-00001")
    assert failed.endswith("cannot be read: Input/output error")
    assert files(sharded) == before
    assert (sharded / "latest").read_text() == "global_step200\n"
    assert command("repair", sharded).lines[1] == f"{folder}: whole"


def test_nothing_is_done_where_nothing_is_wrong(sharded: Path, command: Command) -> None:
    before = {p: p.read_bytes() for p in sharded.rglob("*") if p.is_file()}
    assert command("repair", sharded, "--quarantine").status == 0
    assert {p: p.read_bytes() for p in sharded.rglob("*") if p.is_file()} == before


def test_a_place_without_checkpoints_says_so(tmp_path: Path, command: Command) -> None:
    result = command("repair", tmp_path)
    assert result.status == 2
    assert "no committed checkpoint here" in result.err


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "manifest.json"])
def test_what_cannot_be_opened_is_no_damage_and_keeps_manifest_and_latest(
    name: str, sharded: Path, command: Command, forbid: Callable[[Path, str], None]
) -> None:
    folder = sharded / "global_step200"
    before = {p: p.read_bytes() for p in sharded.rglob("*") if p.is_file()}
    forbid(folder / name, "get")
    forbid(folder / name, "open")
    result = command("repair", sharded, "--quarantine")
    assert (result.status, result.err) == (2, "")
    assert sorted(result.lines) == [
        f"{sharded}/global_step100: whole",
        f"{folder}: failed: {name}: cannot be read: Permission denied",
    ]
    assert command("repair", folder).status == 2
    assert {p: p.read_bytes() for p in sharded.rglob("*") if p.is_file()} == before


def test_a_manifest_that_cannot_be_written_fails_that_tag_and_not_the_rest(
    sharded: Path, command: Command, forbid: Callable[[Path, str], None]
) -> None:
    first, second = (sharded / f"global_step{step}" for step in (100, 200))
    lose(first)
    lose(second)
    forbid(first / "manifest.json", "put")
    result = command("repair", sharded)
    assert result.status == 2
    assert result.lines[0] == f"{first}: failed: manifest.json: Permission denied"
    assert result.lines[1].startswith(f"{second}: rebuilt")


def test_a_second_run_finds_what_the_first_has_put_aside(sharded: Path, command: Command) -> None:
    folder = sharded / "global_step200"
    flip(next(iter(folder.glob("model-00000-*"))), 4096 + 8)
    assert command("repair", sharded, "--quarantine").status == 0
    again = command("repair", sharded)
    assert again.status == 0
    assert any(line.startswith(f"{folder}: quarantined: ") for line in again.lines)
    listed = command("ls", sharded)
    assert any(line.endswith("not committed, quarantined") for line in listed.lines)
    assert command("ls", sharded, "--json").document["tags"][0]["quarantined"] is True
    error = command("inspect", folder).err
    assert "put its manifest aside, as manifest.json.damaged" in error
    assert "did not finish" not in error


@pytest.mark.parametrize(
    ("name", "text"), [("gone", "no such checkpoint directory"), ("latest", "a file, where")]
)
def test_a_path_that_is_no_folder_says_so(
    name: str, text: str, sharded: Path, command: Command
) -> None:
    result = command("repair", sharded / name)
    assert result.status == 2
    assert text in result.err
    assert "Errno" not in result.err


def test_exported_weights_beside_the_tags_are_no_tag(sharded: Path, command: Command) -> None:
    """`zero-ckpt export checkpoints checkpoints/model.safetensors` puts them there."""
    assert command("export", sharded, sharded / "model.safetensors").status == 0
    lose(sharded / "global_step100")
    result = command("repair", sharded)
    assert result.status == 0
    rebuilt, whole = result.lines
    assert rebuilt.startswith(f"{sharded / 'global_step100'}: rebuilt: ")
    assert whole == f"{sharded / 'global_step200'}: whole"
