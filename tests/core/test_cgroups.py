"""A container's limit counts, whichever version of control groups tells it and wherever it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zero_ckpt.core.cgroups import bytes_to_limit

NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def group(folder: Path, version: int, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = NAMES[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {cached}\nslab 3\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_nearest_limit_of_all_groups_around_the_process_counts(
    version: int, tmp_path: Path
) -> None:
    root, told = tmp_path / "cgroup", tmp_path / "told"
    base = root / "memory" if version == 1 else root
    line = "4:memory:/pods/own" if version == 1 else "0::/pods/own"
    told.write_text(f"7:cpu,cpuacct:/elsewhere\n{line}\n")
    group(base / "elsewhere", version, "1", 0, 0)  # of another controller
    group(base / "pods/own", version, "9000", 5000, 600)
    assert bytes_to_limit(root, told) == 4600
    group(base / "pods", version, "7000", 5500, 100)
    assert bytes_to_limit(root, told) == 1600
    group(base, version, "max", 10**6, 0)
    assert bytes_to_limit(root, told) == 1600
    group(base / "pods", version, "7000", 8000, 100)
    assert bytes_to_limit(root, told) == 0


def test_in_a_container_the_folder_may_be_elsewhere_than_told(tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.write_text("0::/of/the/host\n")
    group(tmp_path / "cgroup", 2, "9000", 5000, 0)
    assert bytes_to_limit(tmp_path / "cgroup", told) == 4000


def test_without_groups_or_limits_there_is_none(tmp_path: Path) -> None:
    assert bytes_to_limit(tmp_path, tmp_path / "nothing") == sys.maxsize
    (tmp_path / "told").write_text("0::/\n")
    assert bytes_to_limit(tmp_path, tmp_path / "told") == sys.maxsize
