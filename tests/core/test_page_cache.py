"""What is asked of the page cache comes, and a system that knows no such request is asked in the old way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from zero_ckpt.core import page_cache
from zero_ckpt.core.page_cache import cached_fraction, read_ahead

SIZE = 8 << 20


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a file that the page cache has let go of, as far as its file system has one."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    yield fd
    os.close(fd)


def test_bytes_that_are_read_ahead_lie_in_the_cache(cold: int) -> None:
    before = cached_fraction(cold, SIZE)
    read_ahead(cold, 4096, 4 << 20)
    assert cached_fraction(cold, SIZE) >= max(before, 0.4)


def test_a_system_without_the_request_is_asked_by_fadvise(
    cold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(page_cache, "_POPULATE_READ", 9999)  # EINVAL, as from an older kernel
    monkeypatch.setattr(os, "posix_fadvise", lambda *request: asked.append(request))
    read_ahead(cold, 4096, 1 << 20)
    assert asked == [(cold, 4096, 1 << 20, os.POSIX_FADV_WILLNEED)]


def test_what_cannot_be_mapped_is_no_error(cold: int) -> None:
    read_ahead(cold, 4096, 2 * SIZE)  # beyond the end: the file was cut since it was opened
    assert 0.0 <= cached_fraction(cold, SIZE) <= 1.0
