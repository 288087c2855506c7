"""The storage doubles that the package ships: they go wrong exactly where they are told to."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.memory import aligned_buffer
from zero_ckpt.testing import FaultyStorage, delay_at, fail_at, fail_from


def test_operations_are_counted_in_order_with_their_paths(tmp_path: Path) -> None:
    storage = FaultyStorage(LocalStorage())
    storage.put(f"{tmp_path}/a", b"x")
    storage.get(f"{tmp_path}/a", 10)
    writer = storage.create(f"{tmp_path}/b", 4096)
    writer.write(0, aligned_buffer(4096))
    writer.finish(10)
    reader = storage.open(f"{tmp_path}/b")
    reader.read_into(0, 10, aligned_buffer(4096))
    reader.close()
    storage.list(str(tmp_path))
    storage.sync(str(tmp_path))
    storage.free_bytes(str(tmp_path))
    storage.remove(f"{tmp_path}/b")
    names = ["put", "get", "create", "write", "finish", "open", "read", "list", "sync", "free"]
    assert [operation.name for operation in storage.log] == [*names, "remove"]
    assert [operation.number for operation in storage.log] == list(range(11))
    assert storage.log[3].path == f"{tmp_path}/b"
    assert os.listdir(tmp_path) == ["a"]


def test_only_the_chosen_operation_fails_and_it_never_happens(tmp_path: Path) -> None:
    storage = FaultyStorage(LocalStorage(), fail_at(1, errno.ENOSPC), names={"put"})
    storage.put(f"{tmp_path}/0", b"")
    with pytest.raises(OSError, match=r"No space left on device: '.*/1'") as caught:
        storage.put(f"{tmp_path}/1", b"")
    assert caught.value.errno == errno.ENOSPC
    storage.put(f"{tmp_path}/2", b"")
    assert sorted(os.listdir(tmp_path)) == ["0", "2"]


def test_a_disk_that_breaks_stays_broken(tmp_path: Path) -> None:
    storage = FaultyStorage(LocalStorage(), fail_from(1, errno.EIO))
    storage.list(str(tmp_path))
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            storage.list(str(tmp_path))


def test_a_slow_operation_is_slow_once(tmp_path: Path) -> None:
    asked: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", asked.append)
        storage = FaultyStorage(LocalStorage(), delay_at(1, 30.0))
        for _ in range(3):
            storage.list(str(tmp_path))
    assert asked == [30.0]


def test_the_process_dies_at_the_chosen_operation(tmp_path: Path) -> None:
    code = (
        "import sys; from zero_ckpt.core.local_storage import LocalStorage; from zero_ckpt.testing import *\n"
        "storage = FaultyStorage(LocalStorage(), kill_at(1))\n"
        "for name in 'abc': storage.put(f'{sys.argv[1]}/{name}', b'')\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["a"]


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="no such operations: \\['fsync'\\]"):
        FaultyStorage(LocalStorage(), names={"fsync"})
