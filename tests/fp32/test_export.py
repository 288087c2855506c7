"""Exports to files: every format loads as saved, and output is complete or absent."""

from __future__ import annotations

import errno
import json
import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zero_ckpt
from tests.fp32.models import (
    TAG,
    Net,
    NetWithExtraState,
    assert_same,
    expected,
    save_sharded,
    sharded_expected,
)
from tests.fp32.peak import peak_of
from tests.told import warned
from tests.workers import run_ranks, start_ranks
from zero_ckpt.core.control import control_for_process_group
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.storage import FileWriter
from zero_ckpt.errors import (
    ConfigurationError,
    CorruptShardError,
    DisagreementError,
    RankTimeoutError,
    SaveError,
    UnsafeObjectError,
)
from zero_ckpt.fp32 import (
    assembly,
    convert_zero_checkpoint_to_fp32_state_dict,
    export,
    export_fp32,
    lanes,
)
from zero_ckpt.testing import FaultyStorage, fail_at, kill_at

ROWS = 120_000
"""Rows of a tensor that is large enough to be written by three ranks: 17 MB."""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory that three ranks wrote."""
    directory = tmp_path_factory.mktemp("sharded")
    run_ranks(save_sharded, 3, directory, ROWS)
    return directory


@pytest.fixture(autouse=True)
def _small_files_are_divided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "WORTHWHILE_BLOCKS", 0)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Net, Path]:
    model = Net()
    zero_ckpt.save_checkpoint(tmp_path / "checkpoints", model, step=1)
    return model, tmp_path / "checkpoints"


def load_sharded(index: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """All that an index file names, each from the file that it says."""
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: load(index.parent / name) for name in set(weight_map.values())}
    return {key: files[name].pop(key) for key, name in weight_map.items()} | {
        key: value for rest in files.values() for key, value in rest.items()
    }


def load_bin(path: Path) -> dict[str, Any]:
    assert zipfile.ZipFile(path).testzip() is None, "every checksum holds"
    mapped = torch.load(path, weights_only=True, mmap=True)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    assert_same(mapped, {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)})
    return loaded


@pytest.mark.parametrize(
    ("format", "name", "load"),
    [("safetensors", "model.safetensors", load_file), ("bin", "pytorch_model.bin", load_bin)],
)
def test_every_format_loads_strictly_into_a_plain_module(
    saved: tuple[Net, Path], tmp_path: Path, format: str, name: str, load: Any
) -> None:
    model, directory = saved
    paths = export_fp32(directory, tmp_path / "out", format=format)
    assert paths == [str(tmp_path / "out" / name)]
    assert_same(load(Path(paths[0])), expected(model))
    Net(seed=1).load_state_dict(load(Path(paths[0])), strict=True)
    assert os.listdir(tmp_path / "out") == [name]


@pytest.mark.parametrize(("suffix", "load"), [(".safetensors", load_file), (".bin", load_bin)])
def test_shards_of_three_ranks_are_assembled(
    sharded: Path, tmp_path: Path, suffix: str, load: Any
) -> None:
    """Rows, columns, pieces of a replica, and a dtype that is converted; windows end inside of tensors."""
    (path,) = export_fp32(sharded, tmp_path / f"weights{suffix}")
    assert_same(load(Path(path)), sharded_expected(ROWS))


def test_more_shard_files_than_blocks_are_kept_change_nothing(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "MAX_BLOCKS", 1)
    (path,) = export_fp32(sharded, tmp_path)
    assert_same(load_file(path), sharded_expected(ROWS))


def test_a_tag_folder_and_a_file_without_a_folder_are_fine(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_fp32(sharded / TAG, "weights.safetensors") == [
        str(tmp_path / "weights.safetensors")
    ]


def test_safetensors_files_say_which_framework_they_are_for(
    saved: tuple[Net, Path], tmp_path: Path
) -> None:
    from safetensors import safe_open

    (path,) = export_fp32(saved[1], tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tied_weights_are_stored_once_in_an_archive(
    saved: tuple[Net, Path], tmp_path: Path
) -> None:
    (path,) = export_fp32(saved[1], tmp_path / "x.bin")
    loaded = torch.load(path, weights_only=True)
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


@pytest.mark.parametrize(("format", "load"), [("safetensors", load_file), ("bin", load_bin)])
def test_shard_files_hold_only_their_own_bytes_and_an_index(
    sharded: Path, tmp_path: Path, format: str, load: Any
) -> None:
    paths = export_fp32(sharded, tmp_path, format=format, max_shard_size="1MB")
    *files, index = map(Path, paths)
    assert index.name.endswith(f"{files[0].suffix}.index.json")
    assert_same(load_sharded(index, load), sharded_expected(ROWS))
    largest = max(t.nbytes for t in sharded_expected(ROWS).values())
    assert all(path.stat().st_size < largest + 50_000 for path in files)
    assert sorted(os.listdir(tmp_path)) == sorted(p.name for p in (*files, index))


def test_convert_has_the_arguments_that_deepspeed_users_know(
    saved: tuple[Net, Path], tmp_path: Path
) -> None:
    convert_zero_checkpoint_to_fp32_state_dict(
        saved[1], tmp_path / "out", tag="global_step1", exclude_frozen_parameters=True
    )
    found = load_bin(tmp_path / "out" / "pytorch_model.bin")
    assert set(expected(saved[0])) - set(found) == {"frozen"}


def test_dtype_and_prefix_apply_to_files(sharded: Path, tmp_path: Path) -> None:
    (path,) = export_fp32(sharded, tmp_path, dtype="bf16", strip_prefix="co")
    found = load_file(path)
    assert torch.equal(found["lumns"], sharded_expected(ROWS)["columns"].bfloat16())
    assert found["low"].dtype == torch.bfloat16
    assert found["step"].dtype == torch.int64


def test_extra_state_goes_where_it_can(tmp_path: Path) -> None:
    zero_ckpt.save_checkpoint(tmp_path / "checkpoints", NetWithExtraState(), step=1)
    (path,) = export_fp32(tmp_path / "checkpoints", tmp_path / "x.bin")
    other = NetWithExtraState(seed=1)
    other.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert other.loaded_extra["scales"] == [1.0, 2.5]
    assert torch.equal(other.loaded_extra["history"], torch.arange(4))
    with pytest.warns(UserWarning, match=r"cannot hold.*\['_extra_state'\].*format='bin'"):
        export_fp32(tmp_path / "checkpoints", tmp_path / "x.safetensors")


# ---- a Lightning checkpoint as one file


def save_like_lightning(directory: Path, **content: Any) -> Net:
    model = Net()
    client = {"pytorch-lightning_version": "2.6.0", "epoch": 3, "callbacks": {}, **content}
    zero_ckpt.save_checkpoint(directory, model, step=1, client_state=client)
    return model


def test_a_lightning_file_has_all_but_the_training_state(tmp_path: Path) -> None:
    extra = torch.arange(6).reshape(2, 3).t()
    model = save_like_lightning(tmp_path / "checkpoints", hyper_parameters={"n": 7}, mine=[extra])
    (path,) = export_fp32(tmp_path / "checkpoints", tmp_path, format="ckpt")
    assert path == str(tmp_path / "model.ckpt")
    assert zipfile.ZipFile(path).testzip() is None
    loaded = torch.load(path, weights_only=True)
    assert_same(loaded.pop("state_dict"), expected(model))
    assert torch.equal(loaded.pop("mine")[0], extra)
    assert loaded == {
        "pytorch-lightning_version": "2.6.0",
        "epoch": 3,
        "hyper_parameters": {"n": 7},
    }


def test_a_lightning_file_of_another_writers_checkpoint_is_refused(
    saved: tuple[Net, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="not written by Lightning"):
        export_fp32(saved[1], tmp_path, format="ckpt")


def test_pickled_objects_are_taken_over_only_when_that_is_allowed(tmp_path: Path) -> None:
    warned(save_like_lightning, tmp_path / "checkpoints", hyper_parameters={"kind": Path})
    with pytest.raises(UnsafeObjectError, match="hyper_parameters/kind"):
        export_fp32(tmp_path / "checkpoints", tmp_path, format="ckpt")
    (path,) = export_fp32(tmp_path / "checkpoints", tmp_path, format="ckpt", weights_only=False)
    assert torch.load(path, weights_only=False)["hyper_parameters"]["kind"] is Path


# ---- complete or absent


class FullDisk(LocalStorage):
    """Takes `room` bytes."""

    room = 6 << 20

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> FileWriter:
        writer = super().create(path, nbytes, shared=shared)
        write, taken = writer.write, 0

        def limited(offset: int, data: memoryview) -> None:
            nonlocal taken
            taken += len(data)
            if taken > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(offset, data)

        writer.write = limited  # type: ignore[method-assign]
        return writer


def test_a_full_disk_leaves_the_earlier_result(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"earlier")
    monkeypatch.setattr(export, "AnyStorage", FullDisk)
    with pytest.raises(SaveError, match=r"model\.safetensors.*No space left.*untouched"):
        export_fp32(sharded, tmp_path)
    assert target.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == [target.name]


def test_a_damaged_block_is_named_and_nothing_is_put_in_place(tmp_path: Path) -> None:
    path = Path(zero_ckpt.save_checkpoint(tmp_path / "checkpoints", Net(), step=1).path)
    shard = path / "model-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[4096 + 8] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"model-00000-of-00001.*block 0.*tensors? '"):
        export_fp32(tmp_path / "checkpoints", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_of_other_shape_replaces_the_earlier_one_whole(
    saved: tuple[Net, Path], tmp_path: Path
) -> None:
    """One file, many, many of the same names, one: never two results, never other people's files."""
    out = tmp_path / "out"
    (out / "nested").mkdir(parents=True)
    for name in ("config.json", "model-00001-of-00099.safetensors"):
        (out / name).write_text("not ours")
    others = set(os.listdir(out))
    for limit in (None, "200B", "200B", "300B", None):
        paths = export_fp32(saved[1], out, max_shard_size=limit)
        assert set(os.listdir(out)) == others | {Path(path).name for path in paths}


def test_remains_of_a_killed_export_are_removed(saved: tuple[Net, Path], tmp_path: Path) -> None:
    remains = tmp_path / ".model-00001-of-00003.safetensors.0123abcd.partial"
    foreign = tmp_path / ".other.safetensors.0123abcd.partial"
    for path in (remains, foreign):
        path.write_bytes(b"half")
    export_fp32(saved[1], tmp_path)
    assert not remains.exists()
    assert foreign.exists()


def test_a_folder_that_cannot_be_written_is_named(saved: tuple[Net, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SaveError, match=r"file/out/model\.safetensors: NotADirectoryError"):
        export_fp32(saved[1], tmp_path / "file" / "out")


def test_arguments_that_cannot_work_are_refused(saved: tuple[Net, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="found 'onnx'"):
        export_fp32(saved[1], tmp_path, format="onnx")
    with pytest.raises(ConfigurationError, match=r"named \*\.bin in format 'safetensors'"):
        export_fp32(saved[1], tmp_path / "x.bin", format="safetensors")
    for name in ("x.pt", "x.ckpt"):
        with pytest.raises(ConfigurationError, match=r"use '\.safetensors' or a folder"):
            export_fp32(saved[1], tmp_path / name, format="safetensors")
    with pytest.raises(ConfigurationError, match="leave out max_shard_size"):
        export_fp32(saved[1], tmp_path, format="ckpt", max_shard_size=100)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "WEIGHTS.PT"])
def test_torchs_usual_suffixes_are_files_for_torch(
    saved: tuple[Net, Path], tmp_path: Path, name: str
) -> None:
    assert export_fp32(saved[1], tmp_path / name) == [str(tmp_path / name)]
    assert_same(load_bin(tmp_path / name), expected(saved[0]))
    *files, index = export_fp32(saved[1], tmp_path / name, max_shard_size="300B")
    assert index == str(tmp_path / f"{name}.index.json")
    assert {Path(file).suffix for file in files} == {Path(name).suffix}


def test_a_lightning_file_may_have_torchs_suffix(tmp_path: Path) -> None:
    save_like_lightning(tmp_path / "checkpoints")
    (path,) = export_fp32(tmp_path / "checkpoints", tmp_path / "weights.pt", format="ckpt")
    assert torch.load(path, weights_only=True)["pytorch-lightning_version"] == "2.6.0"


@pytest.mark.parametrize("name", ["w.onnx", "w.h5", "w.NPZ", "model.safetensors.index.json"])
@pytest.mark.parametrize("format", [None, "bin"])
def test_suffixes_of_other_kinds_of_files_are_refused_with_those_that_are_known(
    saved: tuple[Net, Path], tmp_path: Path, name: str, format: str | None
) -> None:
    with pytest.raises(
        ConfigurationError, match=r"no format here.*\.safetensors, \.bin, \.pt, \.pth, \.ckpt"
    ):
        export_fp32(saved[1], tmp_path / "out" / name, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("name", ["run.v1", "llama.fp32", "2026.11.28", "w.onnx/", "w.bin/"])
def test_folders_may_have_dots_in_their_names(
    saved: tuple[Net, Path], tmp_path: Path, name: str
) -> None:
    for _ in range(2):
        (path,) = export_fp32(saved[1], f"{tmp_path}/out/{name}")
        assert path == os.path.join(tmp_path, "out", name, "model.safetensors")
        assert export_fp32(saved[1], tmp_path / "out" / name) == [path], "it exists as a folder"


def test_progress_counts_every_byte(sharded: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    (path,) = export_fp32(sharded, tmp_path, progress=lambda *pair: seen.append(pair))
    size = os.path.getsize(path)
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == -(-size // (4 << 20))


WRITES = {"create", "write", "finish", "put", "sync", "remove"}


def result_of(out: Path, name: str = "model.safetensors") -> dict[str, Any] | None:
    """What a reader finds; None when there is no result. Fails on one that is not whole."""
    load = load_file if name.endswith(".safetensors") else load_bin
    if (out / f"{name}.index.json").exists():
        return load_sharded(out / f"{name}.index.json", load)
    return load(out / name) if (out / name).exists() else None


@pytest.mark.parametrize("limit", [None, "200B"])
def test_whatever_operation_fails_a_reader_finds_one_whole_result_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None
) -> None:
    old, new = Net(seed=1), Net(seed=2)
    for name, model in (("old", old), ("new", new)):
        zero_ckpt.save_checkpoint(tmp_path / name, model, step=1)
    out = tmp_path / "out"
    for number in range(1000):
        export_fp32(tmp_path / "old", out, max_shard_size=limit)
        with monkeypatch.context() as patch:
            storage = FaultyStorage(LocalStorage(), fail_at(number, errno.EIO), names=WRITES)
            patch.setattr(export, "AnyStorage", lambda storage=storage: storage)
            problem = ""
            try:
                export_fp32(tmp_path / "new", out, max_shard_size=limit)
            except SaveError as error:
                problem = str(error)
        if not problem:
            break
        assert "Input/output error" in problem
        found = result_of(out)
        if found is not None:
            same = [torch.equal(found["embed.weight"], m.embed.weight) for m in (old, new)]
            assert_same(found, expected(old if same[0] else new))
        assert not list(out.glob(".*.partial"))
    assert number >= 4
    assert_same(result_of(out) or {}, expected(new))


def export_and_die(source: Path, out: Path, number: int, format: str) -> None:
    storage = FaultyStorage(LocalStorage(), kill_at(number), names=WRITES)
    export.AnyStorage = lambda: storage  # type: ignore[assignment, misc]
    export_fp32(source, out, format=format, max_shard_size="1MB")


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_kill_leaves_the_earlier_result_and_the_next_export_is_whole(
    sharded: Path, tmp_path: Path, format: str
) -> None:
    (path,) = export_fp32(sharded, tmp_path, format=format, exclude_frozen_parameters=True)
    before = Path(path).read_bytes()
    for number in (1, 4, 7):
        with start_ranks(export_and_die, 1, sharded, tmp_path, number, format) as ranks:
            assert ranks.wait(60)[0].status == "died"
        assert Path(path).read_bytes() == before
        assert not list(tmp_path.glob("*.index.json"))
    paths = export_fp32(sharded, tmp_path, format=format, max_shard_size="1MB")
    assert_same(result_of(tmp_path, Path(path).name) or {}, sharded_expected(ROWS))
    assert set(os.listdir(tmp_path)) == {Path(each).name for each in paths}


# ---- memory


def peak_of_export(source: Path, out: Path) -> int:
    return peak_of(lambda: export_fp32(source, out))


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    layers = [torch.nn.Linear(4096, 4096, bias=False) for _ in range(3)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(4096, 4096, bias=False).bfloat16())
    zero_ckpt.save_checkpoint(tmp_path / "checkpoints", model, step=1)
    total = sum(parameter.nbytes for parameter in model.parameters())
    for name in ("x.safetensors", "x.bin"):
        (extra,) = run_ranks(peak_of_export, 1, tmp_path / "checkpoints", tmp_path / name)
        assert extra < 64 << 20 < total / 3


# ---- several ranks


def export_together(source: Path, out: Path, options: dict[str, Any]) -> tuple[list[str], int]:
    """Paths, and bytes that this rank wrote."""
    lanes.WORTHWHILE_BLOCKS = 0
    control, written = control_for_process_group(), [0]
    options = {"timeout": 20.0, **options}
    paths = export_fp32(
        source, out, control=control, progress=lambda done, _: written.append(done), **options
    )
    return paths, written[-1]


def test_ranks_share_the_bytes_of_one_file(sharded: Path, tmp_path: Path) -> None:
    results = run_ranks(export_together, 3, sharded, tmp_path, {})
    (path,) = results[0][0]
    assert all(paths == [path] for paths, _ in results)
    assert_same(load_file(path), sharded_expected(ROWS))
    assert sum(nbytes for _, nbytes in results) == os.path.getsize(path)
    assert all(nbytes > 0 for _, nbytes in results)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_ranks_share_the_files_of_an_archive_export(sharded: Path, tmp_path: Path) -> None:
    options = {"format": "bin", "max_shard_size": "2MB"}
    results = run_ranks(export_together, 3, sharded, tmp_path, options)
    *_, index = results[0][0]
    assert_same(load_sharded(Path(index), load_bin), sharded_expected(ROWS))
    assert all(nbytes > 0 for _, nbytes in results)


def fail_on_rank_1(source: Path, out: Path) -> str:
    if int(os.environ["RANK"]) == 1:
        export.AnyStorage = FullDisk  # type: ignore[misc]
        FullDisk.room = 0
    with pytest.raises(SaveError) as caught:
        export_together(source, out, {})
    return str(caught.value)


def test_a_failure_on_one_rank_is_every_ranks_error(sharded: Path, tmp_path: Path) -> None:
    errors = run_ranks(fail_on_rank_1, 3, sharded, tmp_path)
    assert errors[0] == errors[1] == errors[2]
    assert "rank 1: export to" in errors[0]
    assert "No space left" in errors[0]
    assert os.listdir(tmp_path) == []


def die_on_rank_1(source: Path, out: Path) -> None:
    if int(os.environ["RANK"]) == 1:
        export._Export._write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, misc]
    with pytest.raises(RankTimeoutError, match="export: done: rank 1 died"):
        export_together(source, out, {})


def test_a_rank_that_dies_is_named_and_nothing_is_put_in_place(
    sharded: Path, tmp_path: Path
) -> None:
    with start_ranks(die_on_rank_1, 3, sharded, tmp_path) as ranks:
        outcomes = ranks.wait(60, grace=30)
    assert [outcome.status for outcome in outcomes] == ["returned", "died", "returned"]
    assert os.listdir(tmp_path) == []


def disagree(source: Path, out: Path) -> None:
    options = {"dtype": "bf16"} if int(os.environ["RANK"]) == 1 else {}
    with pytest.raises(DisagreementError, match=r"different exports.*bf16"):
        export_together(source, out, options)


def test_ranks_that_disagree_are_told(sharded: Path, tmp_path: Path) -> None:
    run_ranks(disagree, 2, sharded, tmp_path)
