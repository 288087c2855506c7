"""Exports into an object store: the same bytes as on a disk, and complete or absent."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

import zero_ckpt
from tests.fp32.models import Net, expected
from zero_ckpt.cli import main
from zero_ckpt.core.object_storage import ObjectStorage
from zero_ckpt.core.places import AnyStorage
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import SaveError
from zero_ckpt.fp32 import export, export_fp32
from zero_ckpt.testing import FaultyStorage, fail_at
from zero_ckpt.testing.faults import Hook

WATCHED = {"create", "write", "finish", "put", "sync", "remove"}
_numbers = itertools.count()


class Store(AnyStorage):
    """Objects in memory, behind a hook; a move counts as a `put`."""

    def __init__(self, hook: Hook = lambda _: None) -> None:
        super().__init__()
        self.objects = _Objects("memory")
        self.faulty = FaultyStorage(self.objects, hook, names=WATCHED)
        self.objects.faulty = self.faulty

    def at(self, path: str) -> Storage:
        return self.faulty if path.startswith("memory://") else super().at(path)


class _Objects(ObjectStorage):
    faulty: FaultyStorage

    def move(self, path: str, target: str) -> None:
        self.faulty.note("put", target)
        super().move(path, target)


@contextmanager
def store(hook: Hook = lambda _: None) -> Iterator[Store]:
    made = Store(hook)

    def move(storage: Storage, path: str, target: str) -> None:
        made.objects.move(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "AnyStorage", lambda: made)
        patch.setattr("zero_ckpt.fp32.publishing.move", move)
        yield made


@pytest.fixture
def out() -> Iterator[str]:
    folder = f"memory://exports/{next(_numbers)}"
    yield folder
    AnyStorage().remove(folder)


def save(path: Path, seed: int = 0) -> Path:
    zero_ckpt.save_checkpoint(path, Net(seed=seed), tag="t", step=1)
    return path


def content(folder: str) -> dict[str, bytes]:
    storage = AnyStorage()
    names = [entry.name for entry in storage.list(folder)]
    return {name: storage.get(f"{folder}/{name}", 1 << 30) for name in names}


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("limit", [None, "200B"])
def test_the_bytes_are_those_of_a_file(
    tmp_path: Path, out: str, format: str, limit: str | None
) -> None:
    source = save(tmp_path / "source")
    paths = export_fp32(source, out, format=format, max_shard_size=limit)
    local = export_fp32(source, tmp_path / "out", format=format, max_shard_size=limit)
    assert [path.removeprefix(out) for path in paths] == [
        path.removeprefix(str(tmp_path / "out")) for path in local
    ]
    assert content(out) == {Path(path).name: Path(path).read_bytes() for path in local}


def test_a_url_with_a_formats_suffix_is_a_files_and_the_command_tells_sizes(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "source")
    assert main(["export", str(source), f"{out}/weights.bin", "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file == {"path": f"{out}/weights.bin", "nbytes": len(content(out)["weights.bin"])}


def result_of(out: str) -> dict[str, Any] | None:
    found = content(out)
    if "model.safetensors.index.json" in found:
        weight_map = json.loads(found["model.safetensors.index.json"])["weight_map"]
        return {key: load(found[name])[key] for key, name in weight_map.items()}
    return load(found["model.safetensors"]) if "model.safetensors" in found else None


@pytest.mark.parametrize("limit", [None, "200B"])
def test_whatever_operation_fails_a_reader_finds_one_whole_result_or_none(
    tmp_path: Path, out: str, limit: str | None
) -> None:
    old, new = save(tmp_path / "old", 1), save(tmp_path / "new", 2)
    states = [expected(Net(seed=seed)) for seed in (1, 2)]
    for number in range(1000):
        export_fp32(old, out, max_shard_size=limit)
        with store(fail_at(number, errno.EIO)):
            try:
                export_fp32(new, out, max_shard_size=limit)
            except SaveError:
                pass
            else:
                break
        found = result_of(out)
        if found is not None:
            state = states[not torch.equal(found["embed.weight"], states[0]["embed.weight"])]
            assert found.keys() == state.keys()
            assert all(torch.equal(found[key], value) for key, value in state.items())
    assert number >= 4
    assert torch.equal((result_of(out) or {})["embed.weight"], states[1]["embed.weight"])


def test_an_interrupted_export_goes_on_after_its_whole_objects(tmp_path: Path, out: str) -> None:
    source = save(tmp_path / "source")

    def hook(operation: Any) -> None:
        if operation.name == "create" and "-00003-of-" in operation.path:
            raise KeyboardInterrupt

    with store(hook), pytest.raises(KeyboardInterrupt):
        export_fp32(source, out, max_shard_size="200B")
    assert all(name.startswith(".") for name in content(out))
    with store() as counted:
        paths = export_fp32(source, out, max_shard_size="200B")
    created = [o for o in counted.faulty.log if o.name == "create"]
    assert len(created) == len(paths) - 3
    export_fp32(source, tmp_path / "out", max_shard_size="200B")
    assert content(out) == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
