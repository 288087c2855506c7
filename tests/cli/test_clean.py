"""`zero-ckpt clean`: what killed saves have left goes, and nothing else."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import Command, flip
from tests.faults.jobs import contents, files
from zero_ckpt.cli import clean
from zero_ckpt.core import lease
from zero_ckpt.core.lease import PREFIX, Lease
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.watch import identity
from zero_ckpt.testing import FaultyStorage, Operation


def kill(folder: Path) -> int:
    """Make of a checkpoint what a save leaves that is killed while it writes; bytes of it."""
    (folder / "manifest.json").unlink()
    (folder / "manifest.json.tmp").write_text("{")
    with next(iter(folder.glob("optim-00001-*"))).open("r+b") as file:
        file.write(bytes(1 << 20))  # room that was taken, and not written to yet
    return sum(path.stat().st_size for path in folder.iterdir())


def overwrite(folder: Path) -> None:
    """Leave files of a save to a committed tag that was killed."""
    for path in sorted(folder.glob("model-*")):
        shutil.copy(path, path.with_name(path.name.replace(".safe", ".g2.safe")))


def test_files_of_killed_saves_are_listed_and_removed_when_asked(
    sharded: Path, command: Command
) -> None:
    killed, overwritten = sharded / "global_step100", sharded / "global_step200"
    before = contents(sharded, "global_step200")
    nbytes, count = kill(killed), len(list(killed.iterdir()))
    overwrite(overwritten)
    everything = files(sharded)

    result = command("clean", sharded)
    assert (result.status, result.err) == (0, "")
    first, second, summary = result.lines
    assert first.startswith(f"{killed}: not committed, {count} files, ")
    assert second.startswith(f"{overwritten}: committed; 2 files, ")
    assert summary.startswith(f"{sharded}: nothing was removed; with --yes {count + 2} files, ")
    assert files(sharded) == everything

    document = command("clean", sharded, "--json", "--yes").document
    gone, beside = document["leftovers"]
    assert (gone["tag"], gone["committed"], gone["removed"]) == ("global_step100", False, True)
    assert (gone["nbytes"], len(gone["files"]), gone["kept"]) == (nbytes, count, None)
    assert (beside["tag"], beside["committed"], beside["removed"]) == (
        "global_step200",
        True,
        True,
    )
    assert not killed.exists()
    assert contents(sharded, "global_step200") == before
    assert not [name for name in files(overwritten) if ".g2." in name]

    assert command("clean", sharded, "--yes").lines == [f"{sharded}: nothing to remove"]


def foreign(folder: Path) -> None:
    """Weights of a Hugging Face model, whose files have the same names, without their index."""
    for path in folder.iterdir():
        path.unlink()
    for number in (1, 2):
        weights = {"w": torch.zeros(3)}
        save_file(weights, folder / f"model-{number:05}-of-00002.safetensors", {"format": "pt"})


def put_aside(folder: Path) -> None:
    kill(folder)
    (folder / "manifest.json.damaged").write_text("{")


KEPT: dict[str, tuple[Callable[[Path], object], str]] = {
    "all files are whole": (lambda f: (f / "manifest.json").unlink(), "makes it a checkpoint"),
    "files of others": (foreign, "no save of zero_ckpt has written"),
    "put aside": (put_aside, "put aside by 'zero-ckpt repair --quarantine'"),
}


@pytest.mark.parametrize("harm", KEPT)
def test_what_may_still_be_of_use_stays(harm: str, sharded: Path, command: Command) -> None:
    folder, (do, why) = sharded / "global_step100", KEPT[harm]
    do(folder)
    before = files(sharded)
    result = command("clean", sharded, "--yes")
    first, summary = result.lines
    assert first.startswith(f"{folder}: not committed, ")
    assert "; stays: " in first
    assert why in first
    assert summary == f"{sharded}: nothing to remove"
    assert files(sharded) == before


@pytest.mark.parametrize("first", [0, 1], ids=["at once", "later"])
def test_what_cannot_be_read_just_now_stays(
    first: int, sharded: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole: here only the manifest is lost."""
    folder = sharded / "global_step100"
    (folder / "manifest.json").unlink()
    before, reads = files(sharded), itertools.count()

    def fail(operation: Operation) -> None:
        if operation.path.startswith(f"{folder}/optim-00001") and next(reads) >= first:
            raise OSError(errno.EIO, os.strerror(errno.EIO), operation.path)

    storage = FaultyStorage(LocalStorage(), fail, names={"read"})
    with monkeypatch.context() as patch:
        patch.setattr(clean, "AnyStorage", lambda: storage)
        told, _ = command("clean", sharded, "--yes").lines
    assert told.endswith("; stays: it cannot be read: Input/output error")
    assert files(sharded) == before
    assert command("repair", folder).status == 0


def test_a_damaged_manifest_is_no_reason_to_remove_its_files(
    sharded: Path, command: Command
) -> None:
    flip(sharded / "global_step100" / "manifest.json", 300)
    overwrite(sharded / "global_step100")
    before = files(sharded)
    assert command("clean", sharded, "--yes").lines == [f"{sharded}: nothing to remove"]
    assert files(sharded) == before


def test_other_files_and_their_folder_stay(sharded: Path, command: Command) -> None:
    folder = sharded / "global_step100"
    kill(folder)
    (folder / "notes.txt").write_text("mine")
    assert command("clean", sharded, "--yes").status == 0
    assert files(folder) == ["notes.txt"]


def test_nothing_is_removed_while_a_job_saves(
    sharded: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEWAL", 0.02)
    monkeypatch.setattr(lease, "_LOOK", 0.02)
    kill(sharded / "global_step100")
    saving = Lease(LocalStorage())
    with monkeypatch.context() as other:
        other.setattr(lease, "_JOB", "other")
        saving.acquire(str(sharded), lambda: None)
    try:
        result = command("clean", sharded, "--yes")
    finally:
        saving.release()
    assert result.status == 2
    assert f"{sharded}: another job is saving here: " in result.err
    assert "Nothing was removed. Run it when no job saves there." in result.err
    assert (sharded / "global_step100").exists()


def test_what_is_removed_is_read_as_often_as_what_is_listed(
    sharded: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(sharded / "global_step100")
    reads: list[str] = []
    storage = FaultyStorage(LocalStorage(), lambda o: reads.append(o.path), names={"read"})
    monkeypatch.setattr(clean, "AnyStorage", lambda: storage)
    command("clean", sharded)
    listing = [path for path in reads if ".safetensors" in path]
    reads.clear()
    command("clean", sharded, "--yes")
    assert [path for path in reads if ".safetensors" in path] == listing != []


def test_what_a_dead_job_held_the_directory_with_goes(sharded: Path, command: Command) -> None:
    boot, namespace, pid, _ = identity()
    dead = {"host": "here", "process": [boot, namespace, pid, "0"], "since": "", "renewals": 1}
    held = sharded / f"{PREFIX}abc-1-0"
    held.write_text(json.dumps(dead))
    kill(sharded / "global_step100")
    assert command("clean", sharded, "--yes").status == 0
    assert not held.exists()


def test_a_checkpoint_and_a_missing_folder_are_refused(sharded: Path, command: Command) -> None:
    result = command("clean", sharded / "global_step100")
    assert result.status == 2
    assert f"one checkpoint, not a directory of them: use 'zero-ckpt clean {sharded}'" in result.err
    assert command("clean", sharded / "absent").status == 2
