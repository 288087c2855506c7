"""Tags and `latest`: what counts as a checkpoint, which one is found, and what is never removed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zero_ckpt.core.finding import (
    NOT_COMMITTED,
    Candidates,
    fallback_notice,
    find_checkpoint,
    list_tags,
    locate,
)
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.manifest import FileRecord, Manifest, shard_name
from zero_ckpt.core.retention import prune, remove_tag
from zero_ckpt.core.tag_folder import read_manifest
from zero_ckpt.core.tags import check_tag, read_latest
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    CorruptManifestError,
    CorruptShardError,
    FormatVersionError,
)

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


def found(directory: Path, tag: str | None = None) -> str:
    return Path(find_checkpoint(DISK, str(directory), tag).folder).name


GOOD_TAGS = [
    "global_step1",
    "epoch=0-step=10.ckpt",
    "a b",
    "ä",
    "x" * 200,
    ".hidden",
    "latest2",
    17,
]
BAD_TAGS = [
    "", ".", "..", "latest", "latest.tmp", "a/b", "a\\b", "a\0b", "a\nb", " a", "a ", "-rf", "x" * 201, "ä" * 101,
    "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("tag", GOOD_TAGS, ids=repr)
def test_good_tags_pass(tag: object) -> None:
    assert check_tag(tag) == str(tag)


@pytest.mark.parametrize("tag", BAD_TAGS, ids=ascii)
def test_bad_tags_are_refused(tag: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be a folder's name"):
        check_tag(tag)


@given(st.text(st.characters(), max_size=8))
def test_a_tag_that_passes_is_one_entry_of_a_folder(tag: str) -> None:
    try:
        name = check_tag(tag)
    except ConfigurationError:
        return
    path = Path("/checkpoints") / name
    assert path.parent == Path("/checkpoints")
    assert path.name == name
    assert 0 < len(name.encode()) <= 200


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


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "gone"):
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            list_tags(DISK, str(path))
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            find_checkpoint(DISK, str(path))
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            find_checkpoint(DISK, str(path), "tag")


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


def damage_manifest(folder: Path) -> None:
    data = bytearray((folder / "manifest.json").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "manifest.json").write_bytes(data)


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


def test_manifests_beyond_the_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tag(tmp_path, "t1")
    monkeypatch.setattr("zero_ckpt.core.tag_folder.MAX_MANIFEST", 100)
    with pytest.raises(CorruptManifestError, match=r"manifest\.json.*100 bytes"):
        read_manifest(DISK, str(tmp_path / "t1"))


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


def test_latest_is_read_as_one_name(tmp_path: Path) -> None:
    assert read_latest(DISK, str(tmp_path)) is None
    (tmp_path / "latest").write_text("  t1 \n")
    assert read_latest(DISK, str(tmp_path)) == "t1"
