"""Past findings, replayed: each file of `corpus/TARGET` once broke a reader, or was made to. Its name says what."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
ROOM = 256 << 20
"""Bytes of address space that a target may take beyond what there is; the largest file has 10 KB."""

CASES = [(p.parent.name, p) for p in sorted(CORPUS.rglob("*")) if p.is_file()]


@pytest.fixture(autouse=True)
def _little_memory_and_no_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert os.listdir(tmp_path) == [], "code of the file ran"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("target", "path"), CASES, ids=[f"{target}-{path.stem}" for target, path in CASES]
)
def test_a_past_finding_raises_nothing_but_documented_errors(target: str, path: Path) -> None:
    TARGETS[target](path.read_bytes())


def test_every_target_has_findings() -> None:
    assert {target for target, _ in CASES} == TARGETS.keys()
    assert len(CASES) > 80
