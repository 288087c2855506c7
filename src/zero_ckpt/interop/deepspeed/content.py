"""A tag that DeepSpeed wrote, in the core's terms: a manifest, and files that give chunks and blocks.

The manifest says for each tensor which boxes lie in which files; a file tells where in its bytes a box begins. Blocks
are ranges of DeepSpeed's own files, read when they are wanted.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from zero_ckpt.core.chunks import Box, flat_range_boxes
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.foreign import ForeignManifest
from zero_ckpt.core.manifest import FileRecord
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.runs import encode_runs
from zero_ckpt.core.shard_file import BLOCK, Chunk
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import ANOTHER_TAG
from zero_ckpt.errors import CorruptCheckpointError, CorruptShardError, StateMismatchError
from zero_ckpt.interop.deepspeed.column import Column, Value
from zero_ckpt.interop.deepspeed.file_table import FileTable
from zero_ckpt.interop.deepspeed.folder import open_folder
from zero_ckpt.interop.deepspeed.optimizers import states_of
from zero_ckpt.interop.deepspeed.sources import Source, WholeBlocks
from zero_ckpt.interop.deepspeed.state_file import StateFile
from zero_ckpt.interop.deepspeed.tensors import LayoutError, Part, Piece, Tensor

__all__ = ["describe_tag"]

Tensors = Mapping[str, Tensor]


def describe_tag(storage: Storage, folder: str) -> ForeignManifest:
    """See `open_tag`."""
    opened = open_folder(storage, folder)
    whole = opened.whole
    try:
        model = _model(whole)
        optim = _optim(opened.table, whole)
        state = StateFile(opened)
    except LayoutError as error:
        raise CorruptCheckpointError(f"{folder}: {error}. {ANOTHER_TAG}") from error
    opened.table.forget_all()
    content = _Content(opened.table, {"model": model, "optim": optim}, state)
    step = opened.model.get("global_steps")
    version = opened.model.get("ds_version")
    placed = _Placing()
    return ForeignManifest(
        tag=os.path.basename(folder),
        step=step if type(step) is int and step >= 0 else 0,
        world_size=opened.save.world_size,
        zero_stage=opened.save.stage,
        created=opened.save.created,
        files=_files(opened.table),
        tensors={
            "model": {key: placed.of(tensor) for key, tensor in model.items()},
            "optim": {key: placed.of(tensor) for key, tensor in optim.items()},
            "state": {},
        },
        buffers=[key for key in model if key in whole.buffers],
        frozen=[key for key in model if key in whole.frozen],
        aliases={alias: key for alias, key in whole.aliases.items() if key in model},
        versions={"deepspeed": version} if isinstance(version, str) else {},
        format="DeepSpeed",
        sources=[os.path.relpath(name, folder) for name in opened.table.names],
        problems={"optim": _problem(whole.problem)} if whole.problem else {},
        content=content,
    )


def _problem(text: str) -> str:
    return (
        f"its optimizer state cannot be read: {text}. Load it with load_optimizer_states=False, or "
        "load_module_only=True"
    )


def _files(table: FileTable) -> dict[str, FileRecord]:
    """Files that were opened, by their names in the folder. They have no checksums of ours."""
    root = f"{table.folder}/"
    real = {s.name: s.nbytes for s in table.sources if s.name in table.paths}
    return {name.removeprefix(root): FileRecord(nbytes, "") for name, nbytes in real.items()}


def _model(whole: Column) -> dict[str, Tensor]:
    """Parameters and buffers in the module's order; of a parameter the master weights, not their 16-bit copy."""
    every = whole.module | whole.masters
    names = [name for name in whole.order if name in every and name not in whole.aliases]
    names += [name for name in every if name not in whole.order]
    return {name: every[name] for name in names}


def _optim(table: FileTable, whole: Column) -> dict[str, Tensor]:
    if whole.problem:
        return {}
    numbers: dict[float, Tensor] = {}

    def stored(value: Value) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if value not in numbers:
            file, begin = table.number(struct.pack("<f", value))
            numbers[value] = Tensor("F32", (), (Part((), (), (Piece(file, begin, 0, 1),)),))
        return numbers[value]

    return {
        f"{name}/{key}": stored(value)
        for name, states in states_of(whole)
        for key, value in states.items()
    }


class _Placing:
    """`Tensor` -> `Placed`. Tensors that are cut the same way share one, as in the core's own plans."""

    def __init__(self) -> None:
        self._known: dict[Any, Placed] = {}

    def of(self, tensor: Tensor) -> Placed:
        cuts = tuple(
            (part.offset, part.shape, tuple((p.file, p.start, p.count) for p in part.pieces))
            for part in tensor.parts
        )
        key = (tensor.dtype, tensor.shape, cuts)
        if key not in self._known:
            runs = encode_runs(_boxes(tensor))
            self._known[key] = Placed(tensor.dtype, tensor.shape, runs)
        return self._known[key]


def _boxes(tensor: Tensor) -> Iterator[tuple[int, Box]]:
    """(file, box) of every box of the tensor whose elements lie end to end in a file."""
    for part in tensor.parts:
        for piece in part.pieces:
            for box in flat_range_boxes(part.shape, piece.start, piece.start + piece.count):
                yield piece.file, box.shifted(part.offset)


class _Content:
    """See `core.foreign.ForeignContent`."""

    def __init__(self, table: FileTable, roles: Mapping[str, Tensors], state: StateFile) -> None:
        self._table, self._roles, self._state = table, roles, state

    def file(self, role: str, rank: int) -> Any:
        return self._state if role == "state" else _File(self._table, rank, self._roles[role])

    def damage(self, progress: Callable[[int], None]) -> Iterator[str]:
        """Compares every storage with the checksum (CRC-32) that its archive has."""
        buffer = memoryview(bytearray(BLOCK))
        for file in self._table.opened():
            source = self._table.source_of(file.path)
            relative = os.path.relpath(file.path, self._table.folder)
            for name, begin, nbytes, expected in file.records:
                try:
                    found = _crc(source, begin, nbytes, buffer, progress)
                except CorruptShardError as error:
                    yield str(error)
                    break
                if found != expected and expected:
                    yield f"{relative}: record '{name}': CRC-32 {expected:08x} expected, {found:08x} found"

    def close(self) -> None:
        self._table.close()


def _crc(
    source: Source, begin: int, nbytes: int, buffer: memoryview, progress: Callable[[int], None]
) -> int:
    found, at = 0, begin
    while at < begin + nbytes:
        data = source.read_block(at // BLOCK, buffer)
        part = data[at % BLOCK : at % BLOCK + begin + nbytes - at]
        found, at = zlib.crc32(part, found), at + len(part)
        progress(len(part))
    return found


class _File(WholeBlocks):
    """One file, as far as it holds tensors of one role."""

    def __init__(self, table: FileTable, number: int, tensors: Tensors) -> None:
        self._source, self._number, self._tensors = table.sources[number], number, tensors
        self.name = self._source.name

    @property
    def chunks(self) -> Sequence[Chunk]:
        return [
            self.find(key, box)
            for key, tensor in self._tensors.items()
            for number, box in _boxes(tensor)
            if number == self._number
        ]

    def find(self, key: str, box: Box) -> Chunk:
        tensor = self._tensors[key]
        size = itemsize(tensor.dtype)
        for part in tensor.parts:
            if Box(part.offset, part.shape).intersect(box) is None:
                continue
            at = _flat_index(part, box)
            for piece in _pieces_from(part.pieces, at):
                if piece.file == self._number and piece.start <= at < piece.start + piece.count:
                    begin = piece.begin + (at - piece.start) * size
                    end = begin + box.numel * size
                    return Chunk(key, key, tensor.dtype, tensor.shape, box, begin, end)
        raise StateMismatchError(f"{self.name}: no part of tensor '{key}' at {list(box.offset)}")

    def read_entry(self, key: str) -> bytes:
        raise CorruptShardError(f"{self.name}: no entry '{key}'")

    def close(self) -> None:
        """Sources are closed by their table."""


def _flat_index(part: Part, box: Box) -> int:
    """Where the box begins in the part, row-major."""
    at = 0
    for a, origin, size in zip(box.offset, part.offset, part.shape, strict=True):
        at = at * size + a - origin
    return at


def _pieces_from(pieces: Sequence[Piece], at: int) -> Iterable[Piece]:
    """The piece that element `at` lies in."""
    index = bisect_right(pieces, at, key=lambda piece: piece.start) - 1
    return pieces[max(0, index) : index + 1]
