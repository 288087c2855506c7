"""The full state dict in memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import zero_ckpt
from tests.fp32.models import (
    TAG,
    Net,
    NetWithExtraState,
    assert_same,
    expected,
    save_sharded,
    sharded_expected,
    sharded_values,
)
from tests.fp32.peak import peak_of
from tests.interop.writer import Run, write
from tests.workers import run_ranks
from zero_ckpt.core import checkpoint
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.storage import FileReader
from zero_ckpt.errors import CheckpointNotFoundError, CorruptShardError, UnsafeObjectError
from zero_ckpt.fp32 import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory that three ranks wrote."""
    directory = tmp_path_factory.mktemp("sharded")
    run_ranks(save_sharded, 3, directory)
    return directory


@pytest.mark.parametrize("lazy", [False, True])
def test_shards_of_three_ranks_become_the_values_that_were_saved(sharded: Path, lazy: bool) -> None:
    for path, tag in ((sharded, None), (sharded, TAG), (sharded / TAG, None)):
        assert_same(
            get_fp32_state_dict_from_zero_checkpoint(path, tag, lazy_mode=lazy), sharded_expected()
        )


@pytest.mark.parametrize("lazy", [False, True])
def test_it_loads_strictly_into_a_plain_module(tmp_path: Path, lazy: bool) -> None:
    model = Net()
    zero_ckpt.save_checkpoint(tmp_path, model, step=1)
    state_dict = get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=lazy)
    assert_same(state_dict, expected(model))
    assert state_dict["head.weight"] is state_dict["embed.weight"]
    other = Net(seed=1)
    other.load_state_dict(state_dict, strict=True)
    assert_same(other.state_dict(), model.state_dict())


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    zero_ckpt.save_checkpoint(tmp_path, Net(), step=1)
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path, exclude_frozen_parameters=True)
    assert set(expected(Net())) - set(found) == {"frozen"}


def test_lazy_tensors_read_only_the_bytes_of_a_slice(sharded: Path, tmp_path: Path) -> None:
    """The rows that are asked for lie on one rank: the other ranks' files may be gone."""
    state_dict = get_fp32_state_dict_from_zero_checkpoint(sharded, lazy_mode=True)
    whole, low = state_dict["rows"], state_dict["low"]
    assert (low.dtype, tuple(low.shape)) == (torch.float32, (7, 5, 3))
    other = sharded / TAG / "model-00001-of-00003.safetensors"
    os.rename(other, tmp_path / other.name)
    try:
        assert torch.equal(whole[:2], sharded_values()["rows"][:2])
        assert torch.equal(low[0, 1:3], sharded_values()["low"][0, 1:3].float())
        with pytest.raises(CorruptShardError, match="missing, although the manifest lists it"):
            whole.contiguous()
    finally:
        os.rename(tmp_path / other.name, other)
    assert torch.equal(whole.contiguous(), sharded_values()["rows"])


class Counting(LocalStorage):
    """Counts the bytes that are read from files of tensors."""

    count = 0

    def open(self, path: str) -> FileReader:
        reader = super().open(path)
        read_into = reader.read_into

        def counted(offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
            Counting.count += nbytes
            read_into(offset, nbytes, buffer, keep)

        reader.read_into = counted  # type: ignore[method-assign]
        return reader


@pytest.mark.parametrize("writer", ["ours", "DeepSpeed"])
def test_a_lazy_state_dict_costs_no_tensor_and_a_slice_reads_only_its_blocks(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = torch.randn(6 * BLOCK // 4096, 1024)
    if writer == "ours":
        zero_ckpt.save_checkpoint(tmp_path, Holder(large), tag="t", step=1)
    else:
        write(Run([{"weight": large}], {}, 2, 2, step=None), tmp_path / "t")
    monkeypatch.setattr(checkpoint, "AnyStorage", Counting)
    Counting.count = 0
    weight = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "t", lazy_mode=True)["weight"]
    assert (tuple(weight.shape), weight.dtype) == (tuple(large.shape), torch.float32)
    opened = Counting.count
    assert opened < 100_000
    middle = slice(BLOCK // 4096 + 7, BLOCK // 4096 + 9)
    assert torch.equal(weight[middle], large[middle])
    assert 0 < Counting.count - opened <= 2 * BLOCK
    assert torch.equal(weight.contiguous(), large)
    assert Counting.count - opened > large.nbytes


class Holder(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


def many_layers() -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(20)))


def peak_of_loading(source: Path) -> int:
    """Bytes above the model's own that it takes to load it."""
    model = many_layers()
    return peak_of(lambda: load_state_dict_from_zero_checkpoint(model, source))


def test_loading_a_model_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    model = many_layers()
    zero_ckpt.save_checkpoint(tmp_path, model, step=1)
    total = sum(parameter.nbytes for parameter in model.parameters())
    (extra,) = run_ranks(peak_of_loading, 1, tmp_path)
    assert extra < total / 2  # and not another whole one


def test_files_of_lazy_tensors_are_closed_when_no_tensor_is_left(sharded: Path) -> None:
    state_dict = get_fp32_state_dict_from_zero_checkpoint(sharded, lazy_mode=True)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    first = state_dict["rows"] + 0
    assert len(os.listdir("/proc/self/fd")) > before
    del state_dict
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert torch.equal(first, sharded_values()["rows"])


def test_extra_state_of_modules_is_part_of_it(tmp_path: Path) -> None:
    zero_ckpt.save_checkpoint(tmp_path, NetWithExtraState(), step=1)
    other = NetWithExtraState(seed=1)
    other.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(tmp_path), strict=True)
    assert other.loaded_extra["scales"] == [1.0, 2.5]
    assert torch.equal(other.loaded_extra["history"], torch.arange(4))


class NetWithPickledState(NetWithExtraState):
    def get_extra_state(self) -> Any:
        return {"kind": complex}


@pytest.mark.filterwarnings("ignore:.*pickles")
def test_pickled_extra_state_is_opened_only_when_that_was_asked_for(tmp_path: Path) -> None:
    zero_ckpt.save_checkpoint(tmp_path, NetWithPickledState(), step=1)
    with pytest.raises(UnsafeObjectError, match=r"extra_state.*builtins\.type"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path, weights_only=False)
    assert found["_extra_state"] == {"kind": complex}


def test_optimizer_files_are_not_read(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = zero_ckpt.save_checkpoint(tmp_path, model, optimizer, step=1).path
    (shard,) = Path(path).glob("optim-*")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert_same(get_fp32_state_dict_from_zero_checkpoint(tmp_path), expected(model))


def test_a_model_can_be_loaded_in_place(tmp_path: Path) -> None:
    model = Net()
    zero_ckpt.save_checkpoint(tmp_path, model, step=1)
    other = Net(seed=1)
    assert load_state_dict_from_zero_checkpoint(other, tmp_path) is other
    assert_same(other.state_dict(), model.state_dict())


def test_a_model_can_be_loaded_in_place_of_a_tag_that_is_not_the_latest(tmp_path: Path) -> None:
    model = Net()
    zero_ckpt.save_checkpoint(tmp_path, model, tag="old", step=1)
    zero_ckpt.save_checkpoint(tmp_path, Net(seed=2), tag="new", step=2)
    other = Net(seed=1)
    load_state_dict_from_zero_checkpoint(other, tmp_path, tag="old")
    assert_same(other.state_dict(), model.state_dict())
    with pytest.raises(CheckpointNotFoundError, match="none"):
        load_state_dict_from_zero_checkpoint(other, tmp_path, tag="none")


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint here"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
