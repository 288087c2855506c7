"""One tag folder: what is refused before it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.tag_folders import DISK, make_tag
from zero_ckpt.core.tag_folder import read_manifest
from zero_ckpt.errors import (
    CorruptManifestError,
)


def test_manifests_beyond_the_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tag(tmp_path, "t1")
    monkeypatch.setattr("zero_ckpt.core.tag_folder.MAX_MANIFEST", 100)
    with pytest.raises(CorruptManifestError, match=r"manifest\.json.*100 bytes"):
        read_manifest(DISK, str(tmp_path / "t1"))
