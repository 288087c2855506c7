"""Layouts of output files: pure arithmetic."""

from __future__ import annotations

import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.planner import Placed
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32.archive import Archive
from zero_ckpt.fp32.layout import (
    FileLayout,
    divide,
    in_shards,
    in_stored_order,
    layout_safetensors,
    parse_size,
)
from zero_ckpt.fp32.selection import OutTensor
from zero_ckpt.fp32.torch_file import layout_torch_file, stand_ins

DTYPES = ["F64", "F32", "BF16", "I64", "U8", "BOOL", "U16", "F8_E4M3"]


def tensor(name: str, shape: tuple[int, ...], dtype: str = "F32", *ties: str) -> OutTensor:
    return OutTensor((name, *ties), "model", name, Placed(dtype, shape, ()), dtype)


def placed(role: str, key: str) -> Placed:
    raise AssertionError(f"no lazy tensor is in these trees: {role} {key}")


tensors = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        st.sampled_from(DTYPES),
        st.booleans(),
    ),
    max_size=8,
).map(
    lambda items: [
        tensor(f"t{i}", shape, dtype, *([f"tied{i}"] if tied else []))
        for i, (shape, dtype, tied) in enumerate(items)
    ]
)


def assert_covered(layout: FileLayout) -> None:
    """Every byte has exactly one origin, and elements are aligned."""
    spans = [(s.begin, s.end) for s in (*layout.slots, *layout.literals) if s.end > s.begin]
    at = 0
    for begin, end in sorted(spans):
        assert begin == at
        at = end
    assert at == layout.nbytes
    assert all(s.begin % itemsize(s.tensor.dtype) == 0 for s in layout.slots)
    assert all(s.end - s.begin == s.tensor.nbytes for s in layout.slots)


def write_empty(layout: FileLayout, path: Path) -> None:
    """The file with zeros for the tensors, sparse."""
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for literal in layout.literals:
            file.seek(literal.begin)
            file.write(literal.data)


@given(tensors)
def test_every_byte_of_a_safetensors_file_has_one_origin(items: list[OutTensor]) -> None:
    layout = layout_safetensors(items)
    assert_covered(layout)
    assert sum(len(t.names) for t in items) == len(layout.slots)


@given(tensors)
def test_every_byte_of_a_torch_file_has_one_origin(items: list[OutTensor]) -> None:
    layout = layout_torch_file(stand_ins(items), placed)
    assert_covered(layout)
    assert all(slot.begin % 64 == 0 for slot in layout.slots)
    assert [slot.end for slot in layout.slots] == sorted(slot.end for slot in layout.slots)
    for checksum in layout.checksums:
        assert checksum.begin >= layout.slots[checksum.slot].end


@given(items=tensors)
def test_safetensors_reads_the_laid_out_names_types_and_shapes(
    items: list[OutTensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("layout") / "x.safetensors"
    write_empty(layout_safetensors(items), path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {name for item in items for name in item.names}
        for item in items:
            found = file.get_slice(item.names[-1])
            assert (tuple(found.get_shape()), found.get_dtype()) == (item.shape, item.dtype)


def test_a_torch_file_beyond_4_gib_opens(tmp_path: Path) -> None:
    """Sizes and offsets that 32 bits do not hold, in records before and behind; the file is sparse."""
    path = tmp_path / "x.bin"
    items = [
        tensor("small", (3,), "I64"),
        tensor("large", (5, 1 << 28), "F32", "tied"),
        tensor("behind", (7,), "BF16"),
    ]
    layout = layout_torch_file(stand_ins(items), placed)
    write_empty(layout, path)
    with path.open("r+b") as file:
        file.seek(layout.slots[-1].begin)
        file.write(bytes(range(14)))
    with zipfile.ZipFile(path) as archive:
        sizes = [info.file_size for info in archive.infolist() if "/data/" in info.filename]
        assert sorted(sizes) == [14, 24, 5 << 30]
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in loaded.items()} == {
        "small": (torch.int64, (3,)),
        "large": (torch.float32, (5, 1 << 28)),
        "tied": (torch.float32, (5, 1 << 28)),
        "behind": (torch.bfloat16, (7,)),
    }
    assert loaded["tied"] is loaded["large"]
    assert loaded["behind"].view(torch.uint8).tolist() == list(range(14))


def test_an_archive_with_more_records_than_16_bits_count_opens(tmp_path: Path) -> None:
    archive = Archive("archive")
    archive.add_bytes("version", b"3\n")
    for number in range(65_536):
        archive.add_bytes(str(number), b"%d" % number)
    write_empty(archive.finish(), tmp_path / "x.bin")
    reader = torch._C.PyTorchFileReader(str(tmp_path / "x.bin"))
    assert len(reader.get_all_records()) == 65_537
    assert reader.get_record("65535") == b"65535"
    assert zipfile.ZipFile(tmp_path / "x.bin").read("archive/65535") == b"65535"


def test_safetensors_refuses_a_dtype_that_it_lacks() -> None:
    with pytest.raises(ConfigurationError, match=r"'wave' has dtype C128.*format='bin'"):
        layout_safetensors([tensor("wave", (2,), "C128")])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("5GiB", 5 << 30), ("500 MB", 5 * 10**8), ("1.5kb", 1500), (7, 7)],
)
def test_sizes_are_read_as_people_write_them(text: Any, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 apples", 0, -3, None])
def test_a_size_that_means_nothing_is_refused(text: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_shard_size"):
        parse_size(text)


@given(tensors, st.integers(1, 2000), st.booleans())
def test_shards_hold_all_tensors_in_order_and_stay_below_the_limit(
    items: list[OutTensor], limit: int, copies: bool
) -> None:
    shards = in_shards(items, limit, copies)
    assert [t for shard in shards for t in shard] == items
    for shard in shards:
        total = sum(t.nbytes * (len(t.names) if copies else 1) for t in shard)
        assert total <= limit or len([t for t in shard if t.nbytes]) == 1


@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 64))
def test_shares_cover_every_file_once_and_start_at_whole_windows(
    sizes: list[int], workers: int, unit: int
) -> None:
    shares = divide(sizes, workers, unit)
    assert len(shares) == workers
    for index, size in enumerate(sizes):
        parts = sorted((b, e) for share in shares for file, b, e in share if file == index)
        assert parts[0][0] == 0
        assert parts[-1][1] == size
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        assert all(begin % unit == 0 for begin, _ in parts)


def test_shares_are_about_equal() -> None:
    shares = divide([1000, 3000], 4, 10)
    assert [sum(end - begin for _, begin, end in share) for share in shares] == [1000] * 4


def test_wide_elements_come_first_and_else_the_order_of_the_source_files() -> None:
    items = [
        tensor("a", (1,), "U8"),
        tensor("b", (1,)),
        tensor("c", (1,), "I64"),
        tensor("d", (1,)),
        tensor("e", (2,)),
    ]
    assert [t.key for t in in_stored_order(items)] == ["c", "e", "b", "d", "a"]
