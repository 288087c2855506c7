"""Shard files: any safetensors reader opens them, every changed byte is found, and no lie is believed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tests.core.strategies import boxes_in, shapes
from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.dtensors import TORCH_DTYPES
from zero_ckpt.core.dtypes import ITEMSIZE, itemsize
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.manifest import FileRecord
from zero_ckpt.core.memory import aligned_buffer
from zero_ckpt.core.shard_file import BLOCK, layout_shard
from zero_ckpt.core.shard_reader import ShardReader, open_shard
from zero_ckpt.core.sources import Source
from zero_ckpt.core.staging import ShardWrite
from zero_ckpt.errors import CorruptShardError

NAME = "model-00000-of-00001.safetensors"
META = {"role": "model", "rank": "0"}


def write(
    path: Path, tensors: dict[str, tuple[torch.Tensor, tuple[int, ...], Box, str]]
) -> FileRecord:
    """Write key -> (local tensor, global shape, box, dtype) as one file."""
    items = [(key, dtype, shape, box) for key, (_, shape, box, dtype) in tensors.items()]
    layout = layout_shard(items, META)
    sources = [Source(tensors[chunk.key][0]) for chunk in layout.chunks]
    writer = LocalStorage().create(str(path), layout.nbytes)
    table = ShardWrite(writer, layout, sources, StagingPool(), lambda: None).join()
    writer.finish(layout.nbytes)
    return layout.record(table)


def whole(tensor: torch.Tensor, dtype: str) -> tuple[torch.Tensor, tuple[int, ...], Box, str]:
    return tensor, tuple(tensor.shape), full_box(tuple(tensor.shape)), dtype


def small_tensors() -> dict[str, Any]:
    return {
        "bias": whole(torch.arange(3, dtype=torch.int8), "I8"),
        "w": (torch.arange(6.0).reshape(2, 3), (4, 3), Box((2, 0), (2, 3)), "F32"),
        "none": whole(torch.zeros(0, 2, dtype=torch.bfloat16), "BF16"),
        "scalar": whole(torch.tensor(2.5, dtype=torch.float64), "F64"),
        "wide": whole(torch.tensor([1 + 2j], dtype=torch.complex128), "C128"),
    }


class InMemory:
    """A file whose reader may ask for nothing but what is there."""

    def __init__(self, data: bytes) -> None:
        self.data, self.nbytes = data, len(data)

    def expect(self, offset: int, nbytes: int, keep: bool = False) -> int:
        assert offset % 4096 == 0
        assert offset + nbytes <= self.nbytes
        return 4096

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        assert offset % 4096 == 0
        assert nbytes <= self.nbytes + 4096, "more bytes are asked for than the file has"
        part = self.data[offset : offset + nbytes]
        if len(part) < nbytes:
            raise EOFError(f"the file ends at byte {self.nbytes}")
        buffer[:nbytes] = part

    def close(self) -> None:
        pass


def read_all(data: bytes, record: FileRecord | None = None) -> dict[str, bytes]:
    reader = ShardReader(InMemory(data), NAME, record)
    buffer = aligned_buffer(BLOCK)
    for index in range(reader.num_blocks):
        reader.read_block(index, buffer)
    return {chunk.name: reader.read_entry(chunk.key) for chunk in reader.chunks}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, FileRecord]:
    path = tmp_path_factory.mktemp("small") / NAME
    record = write(path, small_tensors())
    return path.read_bytes(), record


def test_the_safetensors_library_opens_it(tmp_path: Path) -> None:
    write(tmp_path / NAME, small_tensors())
    with safe_open(tmp_path / NAME, "pt") as file:
        assert file.metadata()["format"] == "zero_ckpt"
        assert json.loads(file.metadata()["chunks"])["w"] == {"shape": [4, 3], "offset": [2, 0]}
        for name in ("bias", "w", "none", "scalar"):
            assert torch.equal(file.get_tensor(name), small_tensors()[name][0])
        assert file.get_tensor("wide").view(torch.complex128).tolist() == [[1 + 2j]]
        blocks = file.get_tensor("__zero_ckpt_blocks__")
    data = (tmp_path / NAME).read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert start % 4096 == 0
    assert data[start - 1 : start] == b" "
    assert blocks.tolist() == [xxhash.xxh3_64_intdigest(data[start:-8])]


def test_several_blocks_each_have_their_checksum(tmp_path: Path) -> None:
    tensors = {
        "a": whole(torch.randint(0, 256, (BLOCK + 5000,), dtype=torch.uint8), "U8"),
        "b": whole(torch.randn(BLOCK // 3), "F32"),
        "c": whole(torch.randn(2, BLOCK // 8), "F32"),
    }
    record = write(tmp_path / NAME, tensors)
    data = (tmp_path / NAME).read_bytes()
    with safe_open(tmp_path / NAME, "pt") as file:
        assert all(torch.equal(file.get_tensor(n), t[0]) for n, t in tensors.items())
    reader = open_shard(LocalStorage(), str(tmp_path / NAME), record)
    assert reader.num_blocks == 4
    for name, (tensor, *_) in tensors.items():
        assert reader.read_entry(name) == tensor.numpy().tobytes()
    reader.close()
    bad = bytearray(data)
    place = reader.data_start + 2 * BLOCK + 17
    bad[place] ^= 1
    with pytest.raises(
        CorruptShardError, match=r"block 2 \(bytes \d+-\d+, tensors? '.*checksum"
    ) as error:
        read_all(bytes(bad), record)
    assert f"{reader.data_start + 2 * BLOCK}-" in str(error.value)
    assert reader.num_blocks * 8 + reader.data_start + reader.data_bytes == len(data)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
    lambda name: not name.startswith("__") and "@" not in name
)


@given(st.data(), st.dictionaries(names, st.sampled_from(sorted(ITEMSIZE)), max_size=6))
def test_any_layout_reads_back_as_it_was(data: st.DataObject, dtypes: dict[str, str]) -> None:
    items = []
    for key, dtype in dtypes.items():
        shape = data.draw(shapes)
        offsets = set()
        for _ in range(data.draw(st.integers(1, 2))):
            box = data.draw(boxes_in(shape))
            if box.offset not in offsets:
                items.append((key, dtype, shape, box))
            offsets.add(box.offset)
    layout = layout_shard(items, META)
    body = bytes(layout.data_bytes)
    blocks = [xxhash.xxh3_64_intdigest(body)] if body else []
    file = layout.header + body + struct.pack(f"<{len(blocks)}Q", *blocks)
    assert len(file) == layout.nbytes
    reader = ShardReader(InMemory(file), NAME, None)
    assert reader.chunks == layout.chunks
    assert {(c.key, c.dtype, c.shape, c.box) for c in layout.chunks} == set(items)
    for chunk in layout.chunks:
        nbytes = chunk.end - chunk.begin
        assert chunk.begin % itemsize(chunk.dtype) == 0
        assert nbytes == 0 or chunk.begin % (nbytes & -nbytes) == 0  # as even as its length
        assert reader.find(chunk.key, chunk.box) == chunk
    assert set(load_names(file)) >= {chunk.name for chunk in layout.chunks}


def test_halves_of_large_chunks_begin_where_blocks_begin() -> None:
    """So that twice as many ranks read no block twice, whatever lies beside the large chunks."""
    rows = {"norm": 1, "large": 6 * BLOCK // 4, "step": 3, "larger": 8 * BLOCK // 4, "odd": 1023}
    items = [(key, "F32", (2 * n,), Box((0,), (n,))) for key, n in rows.items()]
    layout = layout_shard(items, META)
    assert [c.key for c in layout.chunks] == ["larger", "large", "norm", "step", "odd"]
    for chunk in layout.chunks[:2]:
        assert chunk.begin % BLOCK == 0
        assert (chunk.end - chunk.begin) // 2 % BLOCK == 0


def test_whole_tensors_come_before_parts_of_equal_length() -> None:
    items = [
        ("part", "F32", (2,), Box((1,), (1,))),
        ("whole", "F32", (1,), Box((0,), (1,))),
        ("other part", "F32", (2,), Box((0,), (1,))),
    ]
    assert [c.key for c in layout_shard(items, META).chunks] == ["whole", "part", "other part"]


def load_names(file: bytes) -> list[str]:
    from safetensors import deserialize

    return [name for name, _ in deserialize(file)]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_is_known_to_torch(dtype: str) -> None:
    assert torch.empty(0, dtype=TORCH_DTYPES[dtype]).element_size() == itemsize(dtype)


def test_tensors_may_be_called_anything() -> None:
    """Even what the file's own entries are called, or what pieces of another tensor would be called."""
    first, second = Box((0,), (1,)), Box((1,), (1,))
    own = [(n, "F32", (1,), first) for n in ("__metadata__", "__zero_ckpt_blocks__", "w@1", "w@1~")]
    items = [*own, ("w", "F32", (2,), first), ("w", "F32", (2,), second)]
    layout = layout_shard(items, META)
    table = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(layout.data_bytes)))
    reader = ShardReader(InMemory(layout.header + bytes(layout.data_bytes) + table), NAME, None)
    assert {(c.key, c.dtype, c.shape, c.box) for c in reader.chunks} == set(items)
    assert len({chunk.name for chunk in reader.chunks}) == len(items)


def test_equal_chunks_give_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a", small_tensors()) == write(tmp_path / "b", small_tensors())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_flipped_byte_is_found(small: tuple[bytes, FileRecord]) -> None:
    data, record = small
    assert read_all(data, record)["bias"] == b"\0\1\2"
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << (at % 8)
        with pytest.raises(CorruptShardError, match=NAME):
            read_all(bytes(bad), record)


def test_every_length_but_the_true_one_is_refused(small: tuple[bytes, FileRecord]) -> None:
    data, record = small
    for bad in (*(data[:n] for n in range(0, len(data), 7)), data[:-1], data + b"\0"):
        with pytest.raises(CorruptShardError, match=rf"{NAME}: {record.nbytes} bytes expected"):
            read_all(bad, record)
        with pytest.raises(CorruptShardError, match=NAME):
            read_all(bad)


HUGE = 10**30
NASTY = [
    None, -1, 0, 1, 7, 2.5, True, "", "x", "F31", "U8", "F64", "C128", [], {}, [0], [1, 2], [-1, 3], [0, HUGE],
    [HUGE, HUGE], [[0], [1]], [HUGE] * 100, {"w": 1}, {"w": {"shape": HUGE}}, HUGE, [True, 8], "[" * 99_999,
    '{"w": {"shape": [4, 3], "offset": [9, 9]}}', '{"w": {"key": ["w"], "shape": [4, 3], "offset": [2, 0]}}',
    '{"w": {"dtype": "C128", "shape": [4, 3], "offset": [2, 0]}}', '{"w": {"dtype": ["F32"]}}', '{"w": [1]}',
    '{"bias": {"dtype": "F64"}}', '{"wide": {"dtype": "C32"}}',
]  # fmt: skip


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from paths(value[index], (*path, index))


def is_idle(path: tuple[Any, ...]) -> bool:
    """Whether nothing is read by this value: notes, and what is known of the padding and the table anyway."""
    name, *rest = path or ("",)
    if name == "__metadata__":
        return rest not in ([], ["chunks"])
    table = name == "__zero_ckpt_blocks__" and rest[:1] in (["dtype"], ["shape"])
    return table or name == "__zero_ckpt_pad__"


def with_header(data: bytes, text: bytes) -> bytes:
    start = 8 + struct.unpack("<Q", data[:8])[0]
    length = -(-(8 + len(text)) // 4096) * 4096 - 8
    return struct.pack("<Q", length) + text.ljust(length) + data[start:]


def test_no_lie_in_the_header_reads_outside_of_the_file(small: tuple[bytes, FileRecord]) -> None:
    """Every value of the header is replaced by every nasty one: the file opens, or the error is the documented one."""
    data, _ = small
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    believed = 0
    for path in paths(header):
        for value in NASTY:
            changed = json.loads(json.dumps(header))
            target: Any = {"root": changed}
            for part in ("root", *path)[:-1]:
                target = target[part]
            target[path[-1] if path else "root"] = value
            text = json.dumps(changed if path else value).encode()
            try:
                read_all(with_header(data, text))
                believed += not is_idle(path)
            except CorruptShardError as error:
                assert NAME in str(error)  # noqa: PT017 - not every lie is one
    assert believed < 30  # what is true already, or has no place where it has one of itself


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"\xff", b"[" * 99_999, b'{"a":' * 99_999, b"9" * 9_999,
     b'{"__metadata__": {"chunks": "{}"}}', b'{"__zero_ckpt_blocks__": 3}'],
    ids=lambda text: text[:4].decode(errors="replace"),
)  # fmt: skip
def test_a_header_of_something_else_is_refused(
    text: bytes, small: tuple[bytes, FileRecord]
) -> None:
    with pytest.raises(CorruptShardError, match=rf"{NAME}: .*header"):
        read_all(with_header(small[0], text))


@pytest.mark.parametrize("length", [0, 1, 4087, 4089, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(length: int, small: tuple[bytes, FileRecord]) -> None:
    with pytest.raises(CorruptShardError, match="header length"):
        read_all(struct.pack("<Q", length) + small[0][8:])


def test_a_missing_file_and_a_missing_chunk_are_named(
    small: tuple[bytes, FileRecord], tmp_path: Path
) -> None:
    with pytest.raises(CorruptShardError, match=rf"{NAME}: missing"):
        open_shard(LocalStorage(), str(tmp_path / NAME), small[1])
    reader = ShardReader(InMemory(small[0]), NAME, small[1])
    with pytest.raises(CorruptShardError, match=r"'w': a chunk at \[0, 0\].*no such chunk"):
        reader.find("w", Box((0, 0), (2, 3)))
    with pytest.raises(CorruptShardError, match=r"'w'.*shape \[2, 3\] found"):
        reader.find("w", Box((2, 0), (1, 3)))
    with pytest.raises(CorruptShardError, match="no entry 'gone'"):
        reader.read_entry("gone")
