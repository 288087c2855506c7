"""An export that was interrupted, run again: whole files of the same export stay, all else is written anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zero_ckpt
from tests.workers import run_ranks, start_ranks
from zero_ckpt.core.control import control_for_process_group
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import RankTimeoutError, SaveError
from zero_ckpt.fp32 import convert_zero_checkpoint_to_fp32_state_dict, export, export_fp32, lanes
from zero_ckpt.interop.universal import convert_to_universal
from zero_ckpt.testing import FaultyStorage
from zero_ckpt.testing.faults import Operation

WATCHED = {"create", "write", "finish", "put", "sync", "remove"}
FORMATS = ["safetensors", "bin"]


def network(width: int, seed: int = 0, layers: int = 4) -> nn.Module:
    """One output file for each layer, when that is the limit."""
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def save(path: Path, width: int, seed: int = 0) -> Path:
    model = network(width, seed)
    zero_ckpt.save_checkpoint(path, model, torch.optim.SGD(model.parameters()), tag="t", step=1)
    return path


def limit(width: int) -> int:
    """Of an output file, in bytes: one layer."""
    return 4 * width * (width + 1)


def content(folder: Path) -> dict[str, bytes]:
    """All that is there, hidden files too."""
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


class Died(BaseException):
    """No process does anything any more."""


@contextmanager
def watched(hook: Callable[[Operation], None] = lambda _: None) -> Iterator[FaultyStorage]:
    storage = FaultyStorage(LocalStorage(), hook, names=WATCHED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "AnyStorage", lambda: storage)
        yield storage


@contextmanager
def dead_from(is_last: Callable[[Operation], bool]) -> Iterator[FaultyStorage]:
    """As if the process were killed at this operation, renames included, in its own thread and all others."""
    dead: list[Operation] = []

    def hook(operation: Operation) -> None:
        if dead or is_last(operation):
            dead.append(operation)
            raise Died

    replace, unlink = os.replace, os.unlink

    def watched_replace(source: str, target: str) -> None:
        storage.note("put", target)
        replace(source, target)

    def watched_unlink(path: str) -> None:
        storage.note("remove", path)
        unlink(path)

    with watched(hook) as storage, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export._Export, "_clean_up", lambda *_: None)
        patch.setattr(os, "replace", watched_replace)
        patch.setattr(os, "unlink", watched_unlink)
        yield storage


def written(storage: FaultyStorage) -> list[str]:
    """Names of the files that an export wrote, each once."""
    paths = {o.path for o in storage.log if o.name == "create"}
    return sorted(os.path.basename(path).split(".")[1] for path in paths)


def finished_in(folder: Path) -> set[str]:
    """Names of files that are durable and whole, by what lies in a folder. Of small files: one note for each."""
    return {name.split(".")[1] for name in os.listdir(folder) if name.endswith(".written")}


@pytest.mark.parametrize(("format", "num_lanes", "every"), [("safetensors", 2, 2), ("bin", 1, 3)])
def test_wherever_an_export_dies_the_next_writes_what_was_not_finished_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, num_lanes: int, every: int
) -> None:
    monkeypatch.setattr(lanes, "LANES", num_lanes)
    monkeypatch.setattr(lanes, "WORTHWHILE_BLOCKS", 0)
    source, options = save(tmp_path / "source", 8), {"format": format, "max_shard_size": limit(8)}
    export_fp32(source, tmp_path / "whole", **options)
    wanted = content(tmp_path / "whole")
    assert len(wanted) == 5
    rewritten = []
    earlier = save(tmp_path / "earlier", 8, seed=3)
    for number in range(0, 1000, every):
        out = tmp_path / "out"
        export_fp32(earlier, out, format=format, max_shard_size=3 * limit(8))
        assert len(content(out)) == 3
        with dead_from(lambda operation, number=number: operation.number == number):  # type: ignore[misc]
            try:
                export_fp32(source, out, **options)
            except Died:
                pass
            else:
                break
        finished = finished_in(out)
        with watched() as storage:
            export_fp32(source, out, **options)
        assert content(out) == wanted, number
        assert not finished & set(written(storage)), number
        assert len(finished) + len(written(storage)) == 4, number
        rewritten.append(len(written(storage)))
        shutil.rmtree(out)
    assert set(rewritten) == {0, 1, 2, 3, 4}


def export_and_die(source: Path, out: Path, format: str, name: str, count: int) -> None:
    """By SIGKILL, at the given operation on the third file."""

    def hook(operation: Operation) -> None:
        nonlocal count
        if operation.name == name and "-00003-of-" in operation.path:
            count -= 1
            if count == 0:
                os.kill(os.getpid(), 9)

    lanes.LANES = 1
    with watched(hook):
        export_fp32(source, out, format=format, max_shard_size=limit(1200))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of two windows each."""
    return save(tmp_path_factory.mktemp("large"), 1200)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("name", "count"), [("create", 1), ("write", 2)])
def test_a_killed_process_is_gone_on_from_between_files_and_inside_of_one(
    large: Path, tmp_path: Path, format: str, name: str, count: int
) -> None:
    with start_ranks(export_and_die, 1, large, tmp_path / "out", format, name, count) as ranks:
        assert ranks.wait(60)[0].status == "died"
    assert not [each for each in os.listdir(tmp_path / "out") if not each.startswith(".")]
    with watched() as storage:
        convert_zero_checkpoint_to_fp32_state_dict(
            large, tmp_path / "out", limit(1200), safe_serialization=format == "safetensors"
        )
    assert [each[-14:] for each in written(storage)] == ["00003-of-00004", "00004-of-00004"]
    export_fp32(large, tmp_path / "whole", format=format, max_shard_size=limit(1200))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def half_done(source: Path, out: Path, **options: Any) -> None:
    """An export of four files, dead when it begins with the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "LANES", 1)
        dead = dead_from(lambda o: o.name == "create" and "-00004-of-" in o.path)
        with dead, pytest.raises(Died):
            export_fp32(source, out, **options)
    assert len(finished_in(out)) == 3


OPTIONS: dict[str, Any] = {"format": "safetensors", "max_shard_size": limit(8)}


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint directory, and an output folder with three of four files finished."""
    source = save(tmp_path / "source", 8)
    half_done(source, tmp_path / "out", **OPTIONS)
    return source, tmp_path / "out"


def test_three_finished_files_are_not_written_again(interrupted: tuple[Path, Path]) -> None:
    with watched() as storage:
        export_fp32(*interrupted, **OPTIONS)
    assert written(storage) == ["model-00004-of-00004"]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16", "max_shard_size": limit(8) // 2},
        {"strip_prefix": "0."},
        {"exclude_frozen_parameters": True},
        {"max_shard_size": limit(8) + 1},
        {"weights_only": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_options_in_between_write_all_files(
    interrupted: tuple[Path, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    """Both ways: the other export takes nothing over, and leaves nothing to the first."""
    source, out = interrupted
    half_done(source, out, **{**OPTIONS, **change})
    export_fp32(source, tmp_path / "whole", **OPTIONS)
    with watched() as storage:
        export_fp32(source, out, **OPTIONS)
    assert len(written(storage)) == 4
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("seed", [1, 0])
def test_another_save_under_the_same_tag_writes_all_files(
    interrupted: tuple[Path, Path], tmp_path: Path, seed: int
) -> None:
    """Also one with equal weights: a checkpoint is what one save wrote."""
    source, out = interrupted
    save(source, 8, seed)
    with watched() as storage:
        export_fp32(source, out, **OPTIONS)
    assert len(written(storage)) == 4
    export_fp32(save(tmp_path / "other", 8, seed), tmp_path / "whole", **OPTIONS)
    assert content(out) == content(tmp_path / "whole")


def test_deepspeed_s_files_count_with_the_time_of_their_last_change(tmp_path: Path) -> None:
    """They hold no checksums of their data."""
    convert_to_universal(save(tmp_path / "ours", 8), tmp_path / "source")
    source, out = tmp_path / "source", tmp_path / "out"
    half_done(source, out, **OPTIONS)
    with watched() as storage:
        export_fp32(source, out, **OPTIONS)
    assert len(written(storage)) == 1
    shutil.rmtree(out)
    half_done(source, out, **OPTIONS)
    weights = next(source.glob("**/0.weight/fp32.pt"))
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with watched() as storage:
        export_fp32(source, out, **OPTIONS)
    assert len(written(storage)) == 4


def test_a_source_that_changes_meanwhile_gives_no_mixture(tmp_path: Path) -> None:
    convert_to_universal(save(tmp_path / "ours", 8), tmp_path / "source")
    weights = next((tmp_path / "source").glob("**/3.weight/fp32.pt"))

    def hook(operation: Operation) -> None:
        if operation.name == "finish" and "-00002-of-" in operation.path:
            weights.write_bytes(weights.read_bytes())

    with watched(hook), pytest.raises(SaveError, match="replaced or changed while it was exported"):
        export_fp32(tmp_path / "source", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    inside = weights.parents[2] / "fp32"
    export_fp32(tmp_path / "source", inside, **OPTIONS)  # its own files are none of the source's
    assert len(list(inside.glob("model-*"))) == 4


def look_elsewhere(source: Path, other: Path, out: Path) -> str:
    if os.environ["RANK"] == "1":
        opened = export.Checkpoint
        export.Checkpoint = lambda storage, _: opened(storage, str(other / "t"))  # type: ignore[assignment, misc]
    with pytest.raises(SaveError) as caught:
        export_fp32(source, out, control=control_for_process_group(), timeout=20.0)
    return str(caught.value)


def test_ranks_that_see_different_checkpoints_give_no_mixture(tmp_path: Path) -> None:
    source, other = save(tmp_path / "source", 8), save(tmp_path / "other", 8, seed=1)
    for error in run_ranks(look_elsewhere, 2, source, other, tmp_path / "out"):
        assert "rank 1: " in error
        assert "ranks see different checkpoints" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "note", "remove"])
def test_a_finished_file_that_is_no_longer_right_is_written_again(
    interrupted: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    source, out = interrupted
    (path,) = out.glob(".model-00002-*.partial")
    (note,) = out.glob(".model-00002-*.written")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "note":
        note.write_text('{"0": 17')
    else:
        path.unlink()
    with watched() as storage:
        export_fp32(source, out, **OPTIONS)
    assert written(storage) == ["model-00002-of-00004", "model-00004-of-00004"]
    export_fp32(source, tmp_path / "whole", **OPTIONS)
    assert content(out) == content(tmp_path / "whole")


def test_the_earlier_result_stays_while_files_wait(
    interrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = interrupted
    export_fp32(save(tmp_path / "earlier", 8, seed=5), out, dtype="keep")
    before = content(out)
    assert list(before) == ["model.safetensors"]
    half_done(source, out, **OPTIONS)
    assert content(out).items() >= before.items()
    export_fp32(source, out, **OPTIONS)
    assert len(content(out)) == 5


def test_control_c_keeps_what_is_finished_and_an_error_nothing(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source", 8), tmp_path / "out"
    for error, kept in ((KeyboardInterrupt(), 2), (OSError(5, "broken"), 0)):

        def hook(operation: Operation, error: BaseException = error) -> None:
            if operation.name == "write" and "-00003-of-" in operation.path:
                raise error

        with pytest.MonkeyPatch.context() as patch, watched(hook):
            patch.setattr(lanes, "LANES", 1)
            with pytest.raises((KeyboardInterrupt, SaveError)):
                export_fp32(source, out, **OPTIONS)
        names = os.listdir(out)
        assert len([name for name in names if name.endswith(".partial")]) == kept
        assert len(names) == 2 * kept


def die_on_rank_1(source: Path, out: Path) -> None:
    def hook(operation: Operation) -> None:
        if os.environ["RANK"] == "1" and operation.name == "finish":
            os.kill(os.getpid(), 9)

    lanes.WORTHWHILE_BLOCKS = 0
    control = control_for_process_group()
    with watched(hook), pytest.raises(RankTimeoutError):
        export_fp32(source, out, control=control, timeout=20.0, max_shard_size=limit(1200))


def test_after_a_lost_rank_the_other_ranks_files_stay(large: Path, tmp_path: Path) -> None:
    with start_ranks(die_on_rank_1, 2, large, tmp_path / "out") as ranks:
        outcomes = ranks.wait(60, grace=30)
    assert [outcome.status for outcome in outcomes] == ["returned", "died"]
    finished = finished_in(tmp_path / "out")
    with watched() as storage:
        export_fp32(large, tmp_path / "out", max_shard_size=limit(1200))
    assert 0 < len(written(storage)) < 4
    assert {*finished, *written(storage)} >= {f"model-{i:05d}-of-00004" for i in range(1, 5)}
    export_fp32(large, tmp_path / "whole", max_shard_size=limit(1200))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
