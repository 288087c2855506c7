from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Command, flip


def test_every_tag_is_listed_oldest_first_with_what_it_is(sharded: Path, command: Command) -> None:
    result = command("ls", sharded)
    assert (result.status, result.err) == (0, "")
    header, first, second = (line.split("  ") for line in result.lines)
    assert [cell.strip() for cell in header if cell] == [
        "TAG",
        "STEP",
        "SIZE",
        "SAVED",
        "STAGE x RANKS",
        "STATUS",
    ]
    assert [cell.strip() for cell in first if cell][:2] == ["global_step100", "100"]
    assert [cell.strip() for cell in first if cell][-2:] == ["3 x 2", "committed"]
    assert [cell.strip() for cell in second if cell][-2:] == ["3 x 2", "committed, latest"]


def test_json_says_the_same_with_exact_numbers(sharded: Path, command: Command) -> None:
    document = command("ls", sharded, "--json").document
    assert (document["directory"], document["latest"]) == (str(sharded), "global_step200")
    tag = document["tags"][0]
    files = (sharded / "global_step100").glob("*.safetensors")
    assert tag["nbytes"] == sum(path.stat().st_size for path in files)
    assert (tag["tag"], tag["step"], tag["world_size"], tag["zero_stage"]) == (
        "global_step100",
        100,
        2,
        3,
    )
    assert (tag["committed"], tag["latest"], tag["problem"]) == (True, False, None)
    assert tag["created"].startswith("20")
    assert tag["created"].endswith("Z")


def test_a_save_that_did_not_commit_is_told_apart(sharded: Path, command: Command) -> None:
    (sharded / "global_step200" / "manifest.json").unlink()
    result = command("ls", sharded)
    (row,) = (line for line in result.lines if line.startswith("global_step200"))
    assert row.endswith("not committed, latest")
    assert command("ls", sharded, "--json").document["tags"][0]["committed"] is False


def test_a_missing_shard_file_shows_without_reading_data(sharded: Path, command: Command) -> None:
    (sharded / "global_step100" / "optim-00001-of-00002.safetensors").unlink()
    result = command("ls", sharded)
    assert "damaged" in result.lines[1]
    assert "global_step100: optim-00001-of-00002.safetensors: " in result.out
    assert result.status == 0


def test_a_damaged_manifest_is_listed_with_the_reason(sharded: Path, command: Command) -> None:
    flip(sharded / "global_step100" / "manifest.json", -10)
    result = command("ls", sharded)
    assert any(line.startswith("global_step100: manifest.json: checksum") for line in result.lines)
    assert [line for line in result.lines if line.startswith("global_step200")]


def test_latest_that_names_no_tag_is_noticed(sharded: Path, command: Command) -> None:
    (sharded / "latest").write_text("gone\n")
    result = command("ls", sharded)
    assert result.lines[-1] == "latest: names 'gone', which is not here"


def test_a_link_to_a_tag_is_shown_beside_it(sharded: Path, command: Command) -> None:
    os.symlink("global_step200", sharded / "last.ckpt")
    result = command("ls", sharded)
    assert result.lines[2].endswith("committed, latest, linked as last.ckpt")
    assert command("ls", sharded, "--json").document["tags"][1]["links"] == ["last.ckpt"]


def test_names_cannot_write_to_the_terminal(sharded: Path, command: Command) -> None:
    (sharded / "global_step100").rename(sharded / "red\x1b[31m")
    result = command("ls", sharded)
    assert "\x1b" not in result.out
    assert "red\\x1b[31m" in result.out


@pytest.mark.parametrize("name", ["missing", "empty", "sharded/global_step100", "sharded/latest"])
def test_what_is_no_checkpoint_directory_is_one_line_and_status_2(
    name: str, sharded: Path, command: Command
) -> None:
    (sharded.parent / "empty").mkdir()
    result = command("ls", sharded.parent / name)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("zero-ckpt ls: ")
    assert str(sharded.parent / name) in result.err


def test_a_folder_of_exported_weights_is_no_tag(sharded: Path, command: Command) -> None:
    folder = sharded / "fp32"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert len(command("ls", sharded, "--json").document["tags"]) == 2
    assert command("verify", sharded).status == 0


@pytest.mark.parametrize("kind", ["damaged", "missing", "whole"])
def test_ls_and_verify_agree_on_what_is_committed(
    kind: str, sharded: Path, command: Command
) -> None:
    manifest = sharded / "global_step100" / "manifest.json"
    if kind == "damaged":
        flip(manifest, -10)
    if kind == "missing":
        manifest.unlink()
    listed = {t["tag"]: t for t in command("ls", sharded, "--json").document["tags"]}
    verified = {t["tag"]: t for t in command("verify", sharded, "--json").document["checkpoints"]}
    for tag in listed.keys() | verified.keys():
        assert listed[tag]["committed"] is verified[tag]["committed"]
    first = listed["global_step100"]
    assert first["committed"] is (kind != "missing")
    assert (first["problem"] is None) is (kind == "whole")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("empty", "Give the checkpoint directory or a tag's folder"),
        ("weights", "it holds 'config.json'. Give the checkpoint directory"),
        ("sharde", "holds 'sharded'. Give the folder that holds the tags"),
        ("last.ckpt", "read with torch.load"),
    ],
)
@pytest.mark.parametrize("what", ["ls", "inspect"])
def test_a_wrong_path_is_told_with_what_to_give(
    what: str, name: str, remedy: str, sharded: Path, command: Command
) -> None:
    root = sharded.parent
    if remedy.startswith("holds"):
        assert [path.name for path in root.iterdir()] == ["sharded"]
    else:
        for folder in ("empty", "weights"):
            (root / folder).mkdir()
        (root / "weights" / "config.json").write_text("{}")
        (root / "last.ckpt").write_bytes(b"PK")
    result = command(what, root / name)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert remedy in result.err


def test_a_tag_that_cannot_be_listed_does_not_hide_the_others(
    sharded: Path, command: Command, forbid: Callable[[Path, str], None]
) -> None:
    (sharded / "global_step100" / "manifest.json").unlink()
    forbid(sharded / "global_step100", "list")
    result = command("ls", sharded)
    assert (result.status, result.err) == (0, "")
    assert [line.split("  ")[-1] for line in result.lines[1:3]] == ["damaged", "committed, latest"]
    assert "global_step100: cannot be listed: Permission denied" in result.lines[-1]
