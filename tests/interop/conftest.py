"""The checkpoints that DeepSpeed wrote (see data/README.md), unpacked once a session."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data" / "deepspeed.tar.xz"


@pytest.fixture(scope="session")
def deepspeed_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases. Read-only: tests that change something copy what they change."""
    folder = tmp_path_factory.mktemp("deepspeed")
    with tarfile.open(DATA) as archive:
        archive.extractall(folder, filter="data")
    return folder
