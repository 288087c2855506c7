"""Writing a range of an output file: what stops it first is what is raised."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.errors import CorruptShardError
from zero_ckpt.fp32.checksums import Checksums
from zero_ckpt.fp32.layout import FileLayout
from zero_ckpt.fp32.writing import WINDOW, write_range


class _Source:
    """Two windows, of which the second is damaged."""

    def __init__(self) -> None:
        self.damaged = threading.Event()

    def fill(self, buffer: memoryview, start: int, stop: int) -> None:
        if start:
            self.damaged.set()
            raise CorruptShardError("block 17: checksum")


class _Disk:
    """Fails, too, but only when the damage is known."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def write(self, offset: int, data: memoryview) -> None:
        assert self._source.damaged.wait(30)
        raise OSError("the disk is full")


def test_damage_is_told_and_not_what_the_disk_says_after_it() -> None:
    source: Any = _Source()
    disk: Any = _Disk(source)
    checksums: Any = Checksums(FileLayout(2 * WINDOW, (), ()))
    pool = StagingPool(2)
    with pytest.raises(CorruptShardError, match="block 17"):
        write_range(disk, source, checksums, 0, 2 * WINDOW, pool, lambda nbytes: True)
    for _ in range(2):
        pool.take()  # both buffers are back
