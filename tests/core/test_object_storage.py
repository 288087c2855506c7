"""Object stores that throttle, fail and hang up: a file appears whole or not at all, and no upload is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.object_server import BUCKET, Request, S3Server
from zero_ckpt.core.memory import ALIGNMENT, aligned_buffer
from zero_ckpt.core.object_storage import ObjectStorage
from zero_ckpt.core.object_writer import PARTS_IN_FLIGHT
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.testing.conformance import read_file, write_file

LARGE = 20_000_000
"""Bytes: three parts."""

PATH = f"s3://{BUCKET}/run/tag/file"


@pytest.fixture(scope="module")
def module_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def server(module_server: S3Server) -> Iterator[S3Server]:
    yield module_server
    module_server.fault = lambda _: ""
    storage.remove(f"s3://{BUCKET}/run")
    assert module_server.keys() == module_server.unfinished() == []
    module_server.requests.clear()


storage = ObjectStorage("s3")


class FirstTime:
    """The fault `kind` for each distinct request, but only when it comes the first time."""

    def __init__(self, kind: str) -> None:
        self.kind, self.hit = kind, set[tuple[str, str, str]]()

    def __call__(self, request: Request) -> str:
        told = request.method, request.path, request.query
        if told in self.hit:
            return ""
        self.hit.add(told)
        return self.kind


def test_a_large_file_goes_up_in_parts_and_a_small_one_in_one_request(server: S3Server) -> None:
    data = os.urandom(LARGE)
    write_file(storage, PATH, data, 4 << 20)
    assert sum(request.is_part for request in server.requests) == 3
    assert storage.get(PATH, LARGE) == data
    server.requests.clear()
    write_file(storage, PATH, data[:100])
    assert [r.method for r in server.requests if r.method != "GET"] == ["PUT"]
    assert storage.get(PATH, LARGE) == data[:100]


def test_parts_go_up_at_the_same_time(server: S3Server) -> None:
    """The first part waits for the second: one after the other would never end."""
    second = threading.Event()

    def fault(request: Request) -> str:
        if request.is_part and "partNumber=2" in request.query:
            second.set()
        if request.is_part and "partNumber=1" in request.query:
            assert second.wait(60)
        return ""

    server.fault = fault
    write_file(storage, PATH, bytes(LARGE), 4 << 20)
    assert second.is_set()


@pytest.mark.parametrize("padding", [0, 100, ALIGNMENT + 1])
def test_a_file_that_ends_near_the_end_of_a_part_has_no_padding(
    padding: int, server: S3Server
) -> None:
    data = os.urandom((16 << 20) - padding)
    write_file(storage, PATH, data, 4 << 20)
    assert storage.get(PATH, LARGE) == data


@pytest.mark.parametrize("kind", ["throttle", "error", "drop", "mute"])
def test_what_fails_once_is_tried_again(kind: str, server: S3Server) -> None:
    """`mute`: it was done, and the answer was lost."""
    server.fault = FirstTime(kind)
    data = os.urandom(LARGE)
    write_file(storage, PATH, data, 4 << 20)
    storage.put(f"{PATH}2", b"1")
    assert storage.get(PATH, LARGE) == data
    assert read_file(storage.open(f"{PATH}2"), 0, 1) == b"1"
    assert server.unfinished() == []
    assert len([entry.name for entry in storage.list(os.path.dirname(PATH))]) == 2


@pytest.mark.parametrize(("kind", "part"), [("throttle", 3), ("drop", 1), ("refuse", 2)])
def test_a_part_that_never_gets_through_fails_the_file_and_leaves_nothing(
    kind: str, part: int, server: S3Server
) -> None:
    server.fault = lambda r: kind if r.is_part and f"partNumber={part}" in r.query else ""
    writer = storage.create(PATH, LARGE)
    with pytest.raises(OSError, match="file") as caught:  # noqa: PT012
        buffer = aligned_buffer(4 << 20)
        for offset in range(0, LARGE, 4 << 20):
            writer.write(offset, buffer)
        writer.finish(LARGE)
    assert caught.value.filename == PATH
    writer.abort()
    assert server.keys() == server.unfinished() == []


def test_after_a_part_that_failed_every_further_one_fails_and_none_waits(server: S3Server) -> None:
    server.fault = lambda r: "refuse" if r.is_part else ""
    writer = storage.create(PATH, 10 * LARGE)
    buffer, failures = aligned_buffer(4 << 20), 0
    for offset in range(0, 10 * LARGE, 4 << 20):
        try:
            writer.write(offset, buffer)
        except OSError:
            failures += 1
    assert failures > PARTS_IN_FLIGHT
    writer.abort()


def test_an_upload_that_a_crashed_job_has_left_goes_with_the_next_of_that_name(
    server: S3Server,
) -> None:
    crash = (
        "import os\n"
        "from zero_ckpt.core.object_storage import ObjectStorage\n"
        "from zero_ckpt.core.memory import aligned_buffer\n"
        f"writer = ObjectStorage('s3').create({PATH!r}, {LARGE})\n"
        f"writer.write(0, aligned_buffer({LARGE}))\n"
        "for future in list(writer._sent.values()): future.result()\n"
        "os._exit(1)\n"
    )
    for clean in (lambda: storage.create(PATH, 1).abort(), lambda: storage.remove(PATH[:-5])):
        subprocess.run([sys.executable, "-c", crash], check=False, timeout=60)
        assert server.unfinished() == ["run/tag/file"]
        clean()
        assert server.unfinished() == []


def test_only_the_bytes_that_are_wanted_are_fetched(server: S3Server) -> None:
    data = os.urandom(LARGE)
    write_file(storage, PATH, data, 4 << 20)
    reader = storage.open(PATH)
    server.requests.clear()
    assert read_file(reader, 8192, 5_000) == data[8192:13_192]
    assert server.sent() == 5_000


def test_more_objects_than_one_answer_lists_are_listed_and_removed(server: S3Server) -> None:
    for number in range(1_001):
        server.add(f"run/many/{number:04}")
    assert len(storage.list(f"s3://{BUCKET}/run/many")) == 1_001
    storage.remove(f"s3://{BUCKET}/run/many")
    assert server.keys() == []


def test_several_writers_of_one_object_are_refused() -> None:
    with pytest.raises(OSError, match="objects have one writer"):
        storage.create(PATH, 1, shared=True)


@pytest.mark.parametrize("scheme", ["nosuch", "gs"])
def test_a_scheme_that_is_unknown_or_not_installed_says_what_to_install(scheme: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{scheme}://: .* Install zero-ckpt\[remote\]"):
        ObjectStorage(scheme)
