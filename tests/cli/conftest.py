"""Checkpoints of real ranks, saved once; each test gets its own copy to damage."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.checkpoints import save_pickled, save_replicated, save_sharded
from tests.workers import run_ranks
from zero_ckpt.cli import main
from zero_ckpt.core.local_storage import LocalStorage


@dataclass(frozen=True, slots=True)
class Result:
    """What one command did."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `zero-ckpt` with the given arguments in this process."""

    def run(*arguments: str | Path) -> Result:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    run_ranks(save_sharded, 2, str(root / "sharded"), [100, 200])
    run_ranks(save_replicated, 2, str(root / "replicated"), "ddp")
    run_ranks(save_pickled, 1, str(root / "pickled"), "t")
    return root


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    """Two tags of FSDP2 on two ranks; `latest` is global_step200."""
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


@pytest.fixture
def replicated(saved: Path, tmp_path: Path) -> Path:
    """One tag of DDP on two ranks."""
    return Path(shutil.copytree(saved / "replicated", tmp_path / "replicated"))


@pytest.fixture
def pickled(saved: Path, tmp_path: Path) -> Path:
    """One tag of one process, with pickled client state."""
    return Path(shutil.copytree(saved / "pickled", tmp_path / "pickled"))


@pytest.fixture
def trace(saved: Path) -> Iterator[Path]:
    """The file that appears when the pickled value is opened."""
    path = saved / "pickled" / "ran"
    assert not path.exists()
    yield path
    path.unlink(missing_ok=True)


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file; a negative offset counts from its end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Makes a call of the local storage (`open`, `list`, `put`) fail on a path, as without permission."""

    def forbid(path: Path, call: str) -> None:
        allowed = getattr(LocalStorage, call)

        def refuse(self: LocalStorage, at: str, *arguments: Any) -> Any:
            if at == str(path):
                raise PermissionError(errno.EACCES, "Permission denied", at)
            return allowed(self, at, *arguments)

        monkeypatch.setattr(LocalStorage, call, refuse)

    return forbid
