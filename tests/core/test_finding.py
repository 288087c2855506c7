"""Which checkpoint a path means: what `latest` names, the newest that is whole, and what is said of the rest."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from tests.core.tag_folders import DISK, SHARD, damage_manifest, make_tag
from zero_ckpt.core.finding import (
    NOT_COMMITTED,
    Candidates,
    fallback_notice,
    find_checkpoint,
    list_tags,
    locate,
)
from zero_ckpt.core.manifest import MANIFEST_NAME
from zero_ckpt.core.retention import remove_tag
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    CorruptShardError,
    FormatVersionError,
    NothingSavedError,
)
from zero_ckpt.testing.faults import FaultyStorage, Operation


def found(directory: Path, tag: str | None = None) -> str:
    return Path(find_checkpoint(DISK, str(directory), tag).folder).name


def test_tags_are_listed_oldest_first_and_other_folders_are_not(tmp_path: Path) -> None:
    make_tag(tmp_path, "b", step=10, created=1)
    make_tag(tmp_path, "a", step=10, created=2)
    make_tag(tmp_path, "z", step=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "events.log").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / SHARD).touch()
    make_tag(tmp_path, "bad", step=99)
    (tmp_path / "bad" / "manifest.json").write_bytes(b"{}")
    listed = list_tags(DISK, str(tmp_path))
    assert [info.name for info in listed] == ["bad", "half", "z", "b", "a"]
    assert "not a zero_ckpt manifest" in listed[0].problem
    assert listed[1].problem == NOT_COMMITTED
    assert all(info.summary is not None for info in listed[2:])


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path) -> None:
    """It has lost its manifest, and its disk or server does not answer at this moment."""
    make_tag(tmp_path, "old", step=1)
    (make_tag(tmp_path, "new", step=2) / MANIFEST_NAME).unlink()
    storage = FaultyStorage(DISK, _refuse_to_list_new, names=("list",))
    infos = {info.name: info.problem for info in list_tags(storage, str(tmp_path))}
    assert infos == {"old": "", "new": f"{tmp_path}/new: cannot be listed: Input/output error"}


def _refuse_to_list_new(operation: Operation) -> None:
    if operation.path.endswith("/new"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), operation.path)


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "gone"):
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            list_tags(DISK, str(path))
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            find_checkpoint(DISK, str(path))
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            find_checkpoint(DISK, str(path), "tag")


def test_a_file_of_a_checkpoint_stands_for_its_folder(tmp_path: Path) -> None:
    """Who gives one is told which folder to give."""
    make_tag(tmp_path, "a", step=1)
    (tmp_path / "latest").write_text("a\n")
    (tmp_path / "weights.pt").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.pt").touch()
    said = {
        tmp_path / "a" / "manifest.json": f"Give its folder, {tmp_path}/a",
        tmp_path / "latest": f"Give its folder, {tmp_path}",
        tmp_path
        / "other"
        / "weights.pt": "Lightning's own .ckpt and other single files are read with",
    }
    for path, remedy in said.items():
        with pytest.raises(CheckpointNotFoundError, match=re.escape(f"expected. {remedy}")):
            find_checkpoint(DISK, str(path))
    with pytest.raises(CheckpointNotFoundError, match="read with torch"):
        find_checkpoint(DISK, str(tmp_path), "weights.pt")


def test_a_tags_folder_that_is_given_with_a_tag_is_said_to_be_one(tmp_path: Path) -> None:
    make_tag(tmp_path, "a", step=1)
    make_tag(tmp_path / "a", "inner", step=2)
    assert found(tmp_path / "a", "inner") == "inner"
    for tag in ("a", "b"):
        with pytest.raises(CheckpointNotFoundError, match=f"{tmp_path}/a is one checkpoint") as e:
            find_checkpoint(DISK, str(tmp_path / "a"), tag)
        assert not isinstance(e.value, NothingSavedError)  # which missing_ok would let pass
        assert f"without a tag, or {tmp_path} with the tag 'a'." in str(e.value)


def test_the_parent_of_checkpoint_directories_says_which_there_are(tmp_path: Path) -> None:
    for run in ("one", "two"):
        make_tag(tmp_path / run, "a", step=1)
    (tmp_path / "notes").mkdir()
    with pytest.raises(NothingSavedError, match=r"but checkpoint directories: 'one', 'two'\. Give"):
        find_checkpoint(DISK, str(tmp_path))


def test_latest_counts_before_age(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_tag(tmp_path, f"t{step}", step)
    (tmp_path / "latest").write_text("t2\n")
    assert find_checkpoint(DISK, str(tmp_path)).problems == ()
    assert found(tmp_path) == "t2"
    assert found(tmp_path, "t1") == "t1"
    assert found(tmp_path / "t3") == "t3"


LATEST = [None, "", "\n", "gone\n", "../t1", "t1\nt2", "a" * 5000, b"\xff\xfe", "half"]


@pytest.mark.parametrize("content", LATEST, ids=lambda c: repr(c)[:12])
def test_an_unusable_latest_falls_back_to_the_newest_and_says_so(
    content: str | bytes | None, tmp_path: Path
) -> None:
    for step in (1, 2):
        make_tag(tmp_path, f"t{step}", step)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / SHARD).touch()
    if content is not None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "latest").write_bytes(data)
    result = find_checkpoint(DISK, str(tmp_path))
    assert result.folder == f"{tmp_path}/t2"
    assert result.problems
    notice = fallback_notice(result.problems, result.folder)
    assert notice.startswith(f"falling back to {tmp_path}/t2")
    assert "latest" in notice or "half" in notice or "gone" in notice


DAMAGES = {
    "manifest flipped": damage_manifest,
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest a folder": lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
    "shard missing": lambda folder: (folder / SHARD).unlink(),
    "shard cut": lambda folder: (folder / SHARD).write_bytes(b"1"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_falls_back_unless_the_tag_was_named(kind: str, tmp_path: Path) -> None:
    for step in (1, 2):
        make_tag(tmp_path, f"t{step}", step)
    (tmp_path / "latest").write_text("t2")
    DAMAGES[kind](tmp_path / "t2")
    result = find_checkpoint(DISK, str(tmp_path))
    assert result.folder == f"{tmp_path}/t1"
    assert "t2" in "".join(result.problems)
    errors = (CorruptCheckpointError, CheckpointNotFoundError)
    with pytest.raises(errors, match="t2"):
        find_checkpoint(DISK, str(tmp_path), "t2")
    with pytest.raises(errors, match="t2"):
        find_checkpoint(DISK, str(tmp_path / "t2"))


def test_all_damaged_is_not_the_same_as_none_here(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint here"):
        find_checkpoint(DISK, str(tmp_path))
    make_tag(tmp_path, "t1")
    (tmp_path / "t1" / SHARD).unlink()
    with pytest.raises(CorruptCheckpointError, match="t1"):
        find_checkpoint(DISK, str(tmp_path))


def test_candidates_go_on_after_a_rejection(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_tag(tmp_path, f"t{step}", step)
    (tmp_path / "latest").write_text("t2")
    candidates = Candidates(DISK, str(tmp_path))
    names = []
    for _ in range(3):
        names.append(Path(candidates.next().folder).name)
        candidates.reject(CorruptShardError(f"{names[-1]}: block 0"))
    assert names == ["t2", "t3", "t1"]
    with pytest.raises(CorruptCheckpointError, match=r"t2: block 0.*t1: block 0"):
        candidates.next()


def test_a_newer_format_is_said_and_not_passed_over(tmp_path: Path) -> None:
    make_tag(tmp_path, "old", 1)
    folder = make_tag(tmp_path, "new", 2)
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data.replace(b'"zero_ckpt": 1', b'"zero_ckpt": 9', 1))
    (tmp_path / "latest").write_text("new")
    with pytest.raises(FormatVersionError, match="format version 9"):
        find_checkpoint(DISK, str(tmp_path))


def test_links_to_folders_are_followed_when_they_are_named(tmp_path: Path) -> None:
    """As Lightning's `save_last="link"` makes them."""
    make_tag(tmp_path / "real", "t1")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "real" / "t1")
    (tmp_path / "dir").symlink_to(tmp_path / "real")
    assert find_checkpoint(DISK, str(tmp_path / "last.ckpt")).folder == f"{tmp_path}/real/t1"
    assert found(tmp_path / "dir") == "t1"
    (tmp_path / "latest").write_text("last.ckpt")
    assert found(tmp_path) == "last.ckpt"
    remove_tag(DISK, str(tmp_path), "last.ckpt")
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert found(tmp_path / "real") == "t1", "what it named is still whole"


def test_a_trailing_slash_changes_nothing(tmp_path: Path) -> None:
    make_tag(tmp_path, "t1")
    assert locate(DISK, f"{tmp_path}/t1//", None) == (str(tmp_path), "t1")
    assert locate(DISK, f"{tmp_path}/", None) == (str(tmp_path), None)
    assert locate(DISK, "/", None) == ("/", None)
