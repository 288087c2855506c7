"""Every storage of ours keeps the protocol's promises."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_server import BUCKET, S3Server
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.object_storage import ObjectStorage
from zero_ckpt.core.places import AnyStorage
from zero_ckpt.core.storage import Storage
from zero_ckpt.testing import RecordingStorage
from zero_ckpt.testing.conformance import StorageConformance

_numbers = itertools.count()
_S3 = AnyStorage()  # one for all tests: connecting takes a second


class TestLocalStorage(StorageConformance):
    @pytest.fixture
    def storage(self) -> Storage:
        return LocalStorage()

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return str(tmp_path)


class TestRecording(StorageConformance):
    @pytest.fixture
    def storage(self) -> Storage:
        return RecordingStorage()

    @pytest.fixture
    def root(self) -> str:
        return "/root"


class TestMemory(StorageConformance):
    @pytest.fixture
    def storage(self) -> Storage:
        return ObjectStorage("memory")

    @pytest.fixture
    def root(self) -> str:
        return f"memory://conformance/{next(_numbers)}"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


class TestS3(StorageConformance):
    @pytest.fixture
    def storage(self, s3: S3Server) -> Storage:
        return _S3

    @pytest.fixture
    def root(self) -> str:
        return f"s3://{BUCKET}/{next(_numbers)}"
