"""What every `Storage` must do, as tests for whoever writes one. Needs pytest; imports no torch.

    class TestMyStorage(StorageConformance):
        @pytest.fixture
        def storage(self) -> Storage:
            return MyStorage()

        @pytest.fixture
        def root(self) -> str:
            return "my://bucket/folder-of-this-test"     # a path below which nothing is

The tests use nothing but the protocol, so they also say what it means.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from zero_ckpt.core.memory import ALIGNMENT, aligned_buffer, round_up
from zero_ckpt.core.storage import FileReader, Storage

__all__ = ["StorageConformance", "read_file", "write_file"]

SIZES = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 50_001]


def write_file(storage: Storage, path: str, data: bytes, part: int = 2 * ALIGNMENT) -> None:
    """Write a file in aligned parts, from two threads, the last part first."""
    writer = storage.create(path, len(data))
    with aligned_buffer(len(data)) as buffer, ThreadPoolExecutor(2) as pool:
        buffer[: len(data)] = data
        starts = range(0, round_up(len(data)), part)
        parts = [(s, buffer[s : min(s + part, round_up(len(data)))]) for s in reversed(starts)]
        for future in [pool.submit(writer.write, *each) for each in parts]:
            future.result()
        del parts
    writer.finish(len(data))


def read_file(reader: FileReader, offset: int, nbytes: int) -> bytes:
    """The range that one read gives."""
    assert reader.expect(offset, nbytes) % ALIGNMENT == 0
    buffer = aligned_buffer(nbytes)
    reader.read_into(offset, nbytes, buffer)
    return bytes(buffer[:nbytes])


class StorageConformance:
    """Subclass it, and give the fixtures `storage` and `root`."""

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_what_was_written_is_read(self, storage: Storage, root: str, nbytes: int) -> None:
        data = os.urandom(nbytes)
        write_file(storage, f"{root}/new/folders/file", data)
        reader = storage.open(f"{root}/new/folders/file")
        assert reader.nbytes == nbytes
        assert read_file(reader, 0, nbytes) == data
        for offset in range(0, nbytes, ALIGNMENT):
            for length in {min(n, nbytes - offset) for n in (0, 1, ALIGNMENT, 5000)}:
                assert read_file(reader, offset, length) == data[offset : offset + length]
        with pytest.raises(EOFError):
            read_file(reader, 0, nbytes + 1)
        reader.close()
        assert storage.get(f"{root}/new/folders/file", nbytes) == data

    def test_a_reader_serves_several_threads(self, storage: Storage, root: str) -> None:
        data = os.urandom(8 * ALIGNMENT)
        write_file(storage, f"{root}/file", data)
        reader = storage.open(f"{root}/file")
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda i: read_file(reader, i * ALIGNMENT, ALIGNMENT), range(8))
            assert b"".join(found) == data
        reader.close()

    def test_a_file_is_emptied_when_it_is_created_again(self, storage: Storage, root: str) -> None:
        write_file(storage, f"{root}/file", b"1" * 30_000)
        write_file(storage, f"{root}/file", b"2" * 5_000)
        assert storage.get(f"{root}/file", 30_000) == b"2" * 5_000

    def test_an_aborted_file_is_gone(self, storage: Storage, root: str) -> None:
        writer = storage.create(f"{root}/file", ALIGNMENT)
        writer.write(0, aligned_buffer(ALIGNMENT))
        writer.abort()
        writer.abort()
        with pytest.raises(FileNotFoundError):
            storage.open(f"{root}/file")

    def test_put_replaces_a_file(self, storage: Storage, root: str) -> None:
        storage.put(f"{root}/new/folder/file", b"old and longer")
        storage.put(f"{root}/new/folder/file", b"new")
        assert storage.get(f"{root}/new/folder/file", 3) == b"new"
        assert [entry.name for entry in storage.list(f"{root}/new/folder")] == ["file"]
        with pytest.raises(ValueError, match="longer than the 2 bytes"):
            storage.get(f"{root}/new/folder/file", 2)

    def test_whoever_reads_while_a_file_is_replaced_sees_one_of_both(
        self, storage: Storage, root: str
    ) -> None:
        versions = [b"1" * 3_000, b"2" * 7_000]
        storage.put(f"{root}/file", versions[0])
        stop, seen = threading.Event(), set()

        def read() -> None:
            while not stop.is_set():
                seen.add(storage.get(f"{root}/file", 10_000))

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            for number in range(20):
                storage.put(f"{root}/file", versions[number % 2])
            stop.set()
            reading.result()
        assert seen <= set(versions)

    def test_listing_names_kinds_and_lengths(self, storage: Storage, root: str) -> None:
        storage.put(f"{root}/b", b"123")
        storage.put(f"{root}/a/inner/file", b"")
        storage.put(f"{root}/c", b"")
        found = {entry.name: (entry.is_dir, entry.nbytes) for entry in storage.list(root)}
        assert list(found) == ["a", "b", "c"]
        assert (found["a"][0], found["b"], found["c"]) == (True, (False, 3), (False, 0))
        assert [entry.name for entry in storage.list(f"{root}/a")] == ["inner"]

    @pytest.mark.parametrize("name", ["epoch=0-step=10.ckpt", "a b+c%20d", "größe-本", "#1?"])
    def test_names_come_back_as_they_were(self, storage: Storage, root: str, name: str) -> None:
        storage.put(f"{root}/{name}/{name}", b"1")
        assert [entry.name for entry in storage.list(root)] == [name]
        assert [entry.name for entry in storage.list(f"{root}/{name}")] == [name]
        assert storage.get(f"{root}/{name}/{name}", 1) == b"1"
        assert storage.open(f"{root}/{name}/{name}").nbytes == 1
        storage.remove(f"{root}/{name}/{name}")
        with pytest.raises(FileNotFoundError):
            storage.open(f"{root}/{name}/{name}")

    def test_removal_takes_files_and_folders_and_their_like_named_neighbours_stay(
        self, storage: Storage, root: str
    ) -> None:
        for path in ("folder/inner/file", "folder/file", "folder2/file", "file", "file2"):
            storage.put(f"{root}/{path}", b"1")
        for path in ("folder", "file", "never there", "nor/this"):
            storage.remove(f"{root}/{path}")
        assert [entry.name for entry in storage.list(root)] == ["file2", "folder2"]
        storage.sync(root)

    def test_what_is_not_there_is_not_found(self, storage: Storage, root: str) -> None:
        storage.put(f"{root}/file", b"1")
        for call in (
            lambda: storage.open(f"{root}/gone"),
            lambda: storage.get(f"{root}/gone", 10),
            lambda: storage.list(f"{root}/gone"),
        ):
            with pytest.raises(FileNotFoundError) as caught:
                call()
            assert f"{root}/gone" in str(caught.value)
        with pytest.raises(NotADirectoryError):
            storage.list(f"{root}/file")

    def test_free_space_is_known_before_the_folder_is_there(
        self, storage: Storage, root: str
    ) -> None:
        free = storage.free_bytes(f"{root}/not/yet")
        assert free is None or free > 0
