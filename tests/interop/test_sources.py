"""Bytes of another system's files, by address."""

from __future__ import annotations

from pathlib import Path

import pytest

from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import CorruptShardError
from zero_ckpt.interop.deepspeed.sources import FileSource


def test_a_file_that_was_replaced_is_refused_each_time_that_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model_states.pt"
    path.write_bytes(b"longer than it was")
    source = FileSource(LocalStorage(), str(path), 4)
    for _ in range(2):
        with pytest.raises(CorruptShardError, match="18 found: it was replaced while it was open"):
            source.range(0, 4)
