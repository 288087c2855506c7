"""Tags and `latest`: what may be a name, and which one is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.tag_folders import DISK
from zero_ckpt.core.tags import check_tag, read_latest
from zero_ckpt.errors import (
    ConfigurationError,
)

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


def test_latest_is_read_as_one_name(tmp_path: Path) -> None:
    assert read_latest(DISK, str(tmp_path)) is None
    (tmp_path / "latest").write_text("  t1 \n")
    assert read_latest(DISK, str(tmp_path)) == "t1"
