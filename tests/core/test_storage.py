"""The local disk: exact bytes with and without direct I/O, atomic replacement, and errors that name the file."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.failing_calls import Call, failing_calls
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.memory import ALIGNMENT, aligned_buffer, round_up

SHM = Path("/dev/shm")


@pytest.fixture(params=["disk", "disk, buffered", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[LocalStorage, Path]]:
    if request.param != "tmpfs":
        yield LocalStorage(direct=request.param == "disk"), tmp_path
        return
    if not os.access(SHM, os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    folder = SHM / f"zero_ckpt-test-{os.getpid()}"
    folder.mkdir()
    try:
        yield LocalStorage(), folder
    finally:
        LocalStorage().remove(str(folder))


def write(storage: LocalStorage, path: Path, data: bytes, part: int = 2 * ALIGNMENT) -> None:
    writer = storage.create(str(path), len(data))
    for start in range(0, len(data), part):
        piece = data[start : start + part]
        with aligned_buffer(len(piece)) as view:
            view[: len(piece)] = piece
            with view[: round_up(len(piece))] as rounded:
                writer.write(start, rounded)
    writer.finish(len(data))


def read(storage: LocalStorage, path: Path, offset: int, nbytes: int, keep: bool = False) -> bytes:
    reader = storage.open(str(path))
    try:
        view = aligned_buffer(nbytes)
        reader.read_into(offset, nbytes, view, keep)
        return bytes(view[:nbytes])
    finally:
        reader.close()


def drop_cached_pages(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 50_001])
def test_what_was_written_is_read(place: tuple[LocalStorage, Path], nbytes: int) -> None:
    storage, folder = place
    data = os.urandom(nbytes)
    path = folder / "new" / "folders" / "file"
    write(storage, path, data)
    assert path.read_bytes() == data
    assert storage.open(str(path)).nbytes == nbytes
    for bring in (Path.read_bytes, drop_cached_pages):
        bring(path)
        for offset in range(0, max(nbytes, 1), ALIGNMENT):
            for length in {min(n, nbytes - offset) for n in (0, 1, 4096, 5000, nbytes)}:
                expected = data[offset : offset + length]
                assert read(storage, path, offset, length) == expected
                assert read(storage, path, offset, length, keep=True) == expected
    with pytest.raises(EOFError, match=str(nbytes)):
        read(storage, path, 0, nbytes + 1)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=20_000), st.integers(1, 3))
def test_a_file_of_any_length_replaces_a_longer_one(
    tmp_path: Path, data: bytes, pages: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 30_000)
    write(LocalStorage(), path, data, pages * ALIGNMENT)
    assert path.read_bytes() == data


@pytest.mark.parametrize("function", ["open", "pwrite", "preadv"])
def test_a_file_system_that_refuses_direct_io_is_used_through_the_cache(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some refuse it when the file is opened, some at the first write or read."""
    real, refused = getattr(os, function), []

    def refuse(target: Any, *args: Any) -> Any:
        flags = args[0] if function == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refused.append(target)
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(target, *args)

    data, path = os.urandom(10_000), tmp_path / "file"
    if function == "preadv":
        write(LocalStorage(), path, data)  # past the cache, so that it is read so too
    monkeypatch.setattr(os, function, refuse)
    if function != "preadv":
        write(LocalStorage(), path, data)
    assert read(LocalStorage(), path, 4096, 5000) == data[4096:9096]
    assert refused or not supports_direct(tmp_path)


def test_two_threads_may_find_out_at_once_that_direct_io_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, both, refused = os.pwrite, threading.Barrier(2), set[int]()

    def refuse(fd: int, data: Any, offset: int) -> int:
        if offset not in refused:
            refused.add(offset)
            both.wait(10)
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    writer = LocalStorage().create(str(tmp_path / "file"), 2 * ALIGNMENT)
    buffer = aligned_buffer(ALIGNMENT)
    buffer[:] = b"x" * ALIGNMENT
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(writer.write, (0, ALIGNMENT), (buffer, buffer)))
    writer.finish(2 * ALIGNMENT)
    assert (tmp_path / "file").read_bytes() == b"x" * 2 * ALIGNMENT


def supports_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_put_replaces_all_or_nothing(
    place: tuple[LocalStorage, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, folder = place
    path = folder / "a" / "manifest.json"
    storage.put(str(path), b"old")
    for call in ("pwrite", "fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise OSError(errno.EIO, "broken")

            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match="broken"):
                storage.put(str(path), b"new and longer")
        assert path.read_bytes() == b"old"
        assert [p.name for p in path.parent.iterdir()] == ["manifest.json"]
    storage.put(str(path), b"new")
    assert storage.get(str(path), 3) == b"new"
    with pytest.raises(ValueError, match="longer than the 2 bytes"):
        storage.get(str(path), 2)


@pytest.mark.timeout(20)
def test_a_pipe_or_a_link_where_a_file_is_written_is_refused_at_once(
    place: tuple[LocalStorage, Path],
) -> None:
    storage, folder = place
    os.mkfifo(folder / "file.tmp")
    os.mkfifo(folder / "shard")
    for call in (
        lambda: storage.put(f"{folder}/file", b"1"),
        lambda: storage.create(f"{folder}/shard", 1),
    ):
        with pytest.raises(OSError, match="a pipe, a socket or a device, and no file"):
            call()
    (folder / "mine").write_text("precious")
    (folder / "other.tmp").symlink_to(folder / "mine")
    for call in (
        lambda: storage.put(f"{folder}/other", b"1"),
        lambda: storage.create(f"{folder}/other.tmp", 1),
    ):
        with pytest.raises(OSError, match=r"a symbolic link, and no file: .*other\.tmp"):
            call()
    assert (folder / "mine").read_text() == "precious"


def test_put_is_durable_before_it_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of system calls: sync the new file, rename it, sync the folder."""
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file")
        real_fsync(fd)

    def replace(a: str, b: str) -> None:
        calls.append("rename")
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    LocalStorage().put(str(tmp_path / "x" / "y" / "file"), b"1")
    assert calls == ["sync folder", "sync folder", "sync file", "rename", "sync folder"]


def test_an_aborted_file_is_gone(place: tuple[LocalStorage, Path]) -> None:
    storage, folder = place
    writer = storage.create(str(folder / "file"), 100)
    writer.abort()
    writer.abort()
    assert not (folder / "file").exists()


def test_a_disk_that_is_too_full_says_so_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        LocalStorage().create(str(tmp_path / "file"), 100)
    assert caught.value.filename == str(tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space_is_fine(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(fd: int, offset: int, length: int) -> None:
        raise OSError(code, "cannot")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    write(LocalStorage(), tmp_path / "file", b"1234")
    assert (tmp_path / "file").read_bytes() == b"1234"


def test_a_disk_that_takes_some_bytes_is_given_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:ALIGNMENT], at))
    data = os.urandom(30_000)
    write(LocalStorage(), tmp_path / "file", data, 30_000)
    assert (tmp_path / "file").read_bytes() == data
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(OSError, match="took no bytes"):
        write(LocalStorage(), tmp_path / "file", data)


def test_listing_names_kinds_and_lengths(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"123")
    (tmp_path / "a").mkdir()
    (tmp_path / "to file").symlink_to(tmp_path / "b")
    (tmp_path / "to folder").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    found = {e.name: (e.is_dir, e.nbytes) for e in LocalStorage().list(str(tmp_path))}
    assert list(found) == ["a", "b", "to file", "to folder"]
    assert found["b"] == found["to file"] == (False, 3)
    assert found["a"][0]
    assert not found["to folder"][0]


def test_removal_takes_links_but_not_what_they_name(tmp_path: Path) -> None:
    storage = LocalStorage()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("link", "nowhere", "never there"):
        storage.remove(str(tmp_path / name))
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    storage.remove(str(tmp_path / "folder"))
    assert not list(tmp_path.iterdir())


def test_errors_are_oserrors_that_name_the_file(tmp_path: Path) -> None:
    storage, file = LocalStorage(), tmp_path / "file"
    file.touch()
    for call in (
        lambda: storage.open(str(tmp_path / "gone")),
        lambda: storage.get(str(tmp_path / "gone"), 10),
        lambda: storage.list(str(tmp_path / "gone")),
        lambda: storage.sync(str(tmp_path / "gone")),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert str(tmp_path / "gone") in str(caught.value)
    with pytest.raises(NotADirectoryError):
        storage.list(str(file))
    with pytest.raises(OSError, match="file"):
        storage.create(str(file / "below" / "it"), 10)
    with pytest.raises(OSError, match="file"):
        storage.put(str(file / "below"), b"")


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    storage = LocalStorage()
    free = storage.free_bytes(str(tmp_path / "not" / "yet"))
    assert free is not None
    assert free > 0
    assert free == pytest.approx(
        os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.5
    )


def test_a_shared_file_outlives_a_writer_that_gives_up(place: tuple[LocalStorage, Path]) -> None:
    """Else the others would fail because of it, with an error that tells nothing of the cause."""
    storage, folder = place
    path, page = folder / "shared", os.urandom(ALIGNMENT)
    storage.create(str(path), len(page)).finish(len(page))
    storage.create(str(path), 0, shared=True).abort()
    writer = storage.create(str(path), 0, shared=True)
    view = aligned_buffer(ALIGNMENT)
    view[:] = page
    writer.write(0, view)
    writer.finish(len(page))
    assert path.read_bytes() == page


def test_several_writers_fill_one_shared_file(place: tuple[LocalStorage, Path]) -> None:
    storage, folder = place
    path, pages = folder / "shared", [os.urandom(ALIGNMENT) for _ in range(2)]
    storage.create(str(path), 2 * ALIGNMENT).finish(2 * ALIGNMENT)
    writers = [storage.create(str(path), 0, shared=True) for _ in pages]
    for index, page in enumerate(pages):
        view = aligned_buffer(ALIGNMENT)
        view[:] = page
        writers[index].write(index * ALIGNMENT, view)
    for writer in writers:
        writer.finish(2 * ALIGNMENT)
    assert path.read_bytes() == b"".join(pages)


def test_a_closed_reader_can_be_closed_again_and_leaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1" * 5000)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        reader = LocalStorage().open(str(tmp_path / "file"))
        reader.close()
        reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_that_cannot_be_closed_closes_nobody_elses_file_later(tmp_path: Path) -> None:
    def refuse(call: Call, function: Any, args: tuple[Any, ...]) -> Any:
        result = function(*args)  # the descriptor is gone, whatever close says
        if call[0] == "close":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return result

    (tmp_path / "file").write_bytes(b"1" * 5000)
    before = len(os.listdir("/proc/self/fd"))
    with failing_calls(tmp_path, refuse) as calls:
        reader = LocalStorage().open(str(tmp_path / "file"))
        opened = [call for call in calls.seen if call[0] == "open"]
        reader.close()
        reader.close()
    assert len([call for call in calls.seen if call[0] == "close"]) == len(opened)
    assert len(os.listdir("/proc/self/fd")) == before
