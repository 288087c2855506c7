"""Checkpoints made to deceive: every checksum is right, and what they protect is a lie.

No lie makes a reader leave the file, take memory without bound, or raise anything but a documented error; all ranks
raise the same, and nothing is loaded.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.jobs import Job, Raised, contents
from tests.faults.lies import Change, read_manifest, rewrite_manifest, rewrite_shard
from tests.workers import run_ranks
from zero_ckpt import get_fp32_state_dict_from_zero_checkpoint
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.storage import FileReader
from zero_ckpt.errors import (
    CorruptCheckpointError,
    FormatVersionError,
    StateMismatchError,
)

WORLD = 2
DOCUMENTED = (CorruptCheckpointError, FormatVersionError, StateMismatchError)
ROOM = 400 << 20
"""Bytes of address space that a process may take beyond what it has; the checkpoints are some kilobytes."""

MODEL, OPTIM, STATE = (f"{role}-00000-of-00002.safetensors" for role in ("model", "optim", "state"))


class Fenced(LocalStorage):
    """Fails the test when anything outside of a file is asked for."""

    def open(self, path: str) -> FileReader:
        reader = super().open(path)
        read_into = reader.read_into

        def fenced(offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
            assert 0 <= offset <= offset + nbytes <= reader.nbytes, (path, offset, nbytes)
            read_into(offset, nbytes, buffer, keep)

        reader.read_into = fenced  # type: ignore[method-assign]
        return reader


def believe(directories: list[str]) -> list[list[Raised | str]]:
    """What comes of each directory through three doors: a load, every byte, the fp32 collapse."""
    job = Job.at(3, sharded=True, storage=Fenced())
    before = job.bits()
    doors: list[Callable[[str], Any]] = [
        lambda directory: job.load(directory, tag="tag"),
        lambda directory: contents(directory, "tag"),
        lambda directory: get_fp32_state_dict_from_zero_checkpoint(directory, "tag"),
    ]
    contents(directories[0], "tag")  # imports and buffers come before the limit
    _limit_memory()
    found = []
    for directory in directories:
        found.append([_outcome(door, directory) for door in doors])
        if isinstance(found[-1][0], Raised):
            assert job.bits() == before, directory
        else:
            job = Job.at(3, sharded=True, storage=Fenced())
    return found


def _outcome(door: Callable[[str], Any], directory: str) -> Raised | str:
    try:
        door(directory)
    except DOCUMENTED as error:
        return Raised(type(error).__name__, str(error))
    except Exception as error:
        return f"undocumented {error!r}"
    return "loaded"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("honest")
    run_ranks(save_one, WORLD, str(directory))
    return directory


def save_one(directory: str) -> None:
    Job.at(1, sharded=True).save(directory, tag="tag")


def tell(
    honest: Path, root: Path, lies: dict[str, Change], rewrite: Callable[[Path, Change], None]
) -> dict[str, list[Raised | str]]:
    """Outcomes of each lie, which must be the same on every rank; the first of all is the truth."""
    told = {"the truth": lambda _: None, **lies}
    directories = []
    for number, lie in enumerate(told.values()):
        directory = root / str(number)
        shutil.copytree(honest, directory)
        rewrite(directory / "tag", lie)
        directories.append(str(directory))
    results = run_ranks(believe, WORLD, directories, timeout=100)
    for number, what in enumerate(told):
        assert results[0][number] == results[1][number], what
    outcomes = dict(zip(told, results[0], strict=True))
    assert outcomes.pop("the truth") == ["loaded"] * 3
    believed = {
        what: got for what, got in outcomes.items() if not set(got) <= {"loaded"} | _raised(got)
    }
    assert believed == {}
    return outcomes


def _raised(outcomes: list[Raised | str]) -> set[Raised | str]:
    return {outcome for outcome in outcomes if isinstance(outcome, Raised)}


def put(*path: Any, value: Any) -> Change:
    """Replace the value at a path of keys and indices."""

    def change(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return change


def nested(depth: int) -> bytes:
    return b'{"layouts":' + b"[" * depth + b"]" * depth + b"}"


def layout_of(body: dict[str, Any], role: str, key: str) -> dict[str, Any]:
    found: dict[str, Any] = body["layouts"][body["tensors"][role][key]]
    return found


def layouts(role: str, key: str, **fields: Any) -> Change:
    """Give one tensor a layout of its own, with other fields."""

    def change(body: dict[str, Any]) -> None:
        body["layouts"].append({**layout_of(body, role, key), **fields})
        body["tensors"][role][key] = len(body["layouts"]) - 1

    return change


def run(**fields: Any) -> dict[str, Any]:
    return {"rank": 0, "offset": [0, 0], "shape": [16, 8], **fields}


HUGE = 1 << 40
MANY = 10**9
WEIGHT = ("model", "first.weight")
MOMENT = ("optim", "first.weight/exp_avg")

MANIFEST_LIES: dict[str, Change] = {
    "empty": lambda _: b"",
    "no object": lambda _: b"[]",
    "nothing in it": lambda _: b"{}",
    "deep": lambda _: nested(100_000),
    "deeper than the parser's stack": lambda _: nested(3_000_000),
    "a number of a million digits": lambda _: b'{"step": 1' + b"0" * 1_000_000 + b"}",
    "not a number": put("created", value=float("nan")),
    "time beyond float": put("created", value=10**400),
    "time as text": put("created", value="1.0"),
    "duration as list": put("timings", "commit", value=[1.0]),
    "negative step": put("step", value=-1),
    "step as text": put("step", value="1"),
    "world of a billion": put("world_size", value=MANY),
    "world beyond any int": put("world_size", value=10**300),
    "empty world": put("world_size", value=0),
    "smaller world": put("world_size", value=1),
    "generation 0": put("generation", value=0),
    "another generation": put("generation", value=2),
    "endless generation": put("generation", value=10**200),
    "file outside": lambda body: body["files"].update({f"../tag/{MODEL}": [9, "0" * 32]}),
    "absolute file": lambda body: body["files"].update({"/etc/passwd": [9, "0" * 32]}),
    "file that is not there": lambda body: body["files"].update({f"{MODEL}x": [9, "0" * 32]}),
    "huge file": put("files", MODEL, 0, value=1 << 62),
    "file without length": put("files", MODEL, 0, value=None),
    "another checksum": put("files", MODEL, 1, value="0" * 32),
    "file as number": put("files", MODEL, value=7),
    "file left out": lambda body: body["files"].pop(MODEL) and None,
    "state file left out": lambda body: body["files"].pop(STATE) and None,
    "files swapped": lambda body: body["files"].update(
        {MODEL: body["files"][OPTIM], OPTIM: body["files"][MODEL]}
    ),
    "huge shape": layouts(*WEIGHT, shape=[HUGE, 8], runs=[run(shape=[HUGE, 8])]),
    "huge optimizer state": layouts(*MOMENT, shape=[HUGE, 8], runs=[run(shape=[HUGE, 8])]),
    "large optimizer state": layouts(*MOMENT, shape=[1 << 24, 8], runs=[run(shape=[1 << 24, 8])]),
    "shape beyond any int": layouts(*WEIGHT, shape=[10**100], runs=[]),
    "negative shape": layouts(*WEIGHT, shape=[-16, -8]),
    "a thousand dimensions": layouts(*WEIGHT, shape=[1] * 1000, runs=[]),
    "shape with the same elements": layouts(*WEIGHT, shape=[8, 16], runs=[run(shape=[8, 16])]),
    "another type": layouts(*WEIGHT, dtype="I32"),
    "wider type": layouts(*WEIGHT, dtype="F64"),
    "unknown type": layouts(*WEIGHT, dtype="F1024"),
    "type as list": layouts(*WEIGHT, dtype=["F32"]),
    "no chunks": layouts(*WEIGHT, runs=[]),
    "hole": layouts(*WEIGHT, runs=[run(shape=[7, 8])]),
    "overlap": layouts(*WEIGHT, runs=[run(), run(rank=1, offset=[8, 0], shape=[8, 8])]),
    "same chunk twice": layouts(*WEIGHT, runs=[run(shape=[8, 8]), run(rank=1, shape=[8, 8])]),
    "chunk outside": layouts(*WEIGHT, runs=[run(offset=[HUGE, 0])]),
    "rank outside": layouts(*WEIGHT, runs=[run(rank=2)]),
    "chunks swapped": layouts(
        *WEIGHT, runs=[run(rank=1, shape=[8, 8]), run(offset=[8, 0], shape=[8, 8])]
    ),
    "a billion chunks": layouts(
        *WEIGHT,
        shape=[MANY, 8],
        runs=[run(shape=[1, 8], count=MANY, stride=1, dim=0, step=1, last=1)],
    ),
    "chunks in place": layouts(
        *WEIGHT, runs=[run(shape=[8, 8], count=2, stride=1, dim=0, step=0, last=8)]
    ),
    "chunks on one rank": layouts(
        *WEIGHT, runs=[run(shape=[8, 8], count=2, stride=0, dim=0, step=8, last=8)]
    ),
    "dimension outside": layouts(
        *WEIGHT, runs=[run(shape=[8, 8], count=2, stride=1, dim=9, step=8, last=8)]
    ),
    "unknown field": layouts(*WEIGHT, runs=[run(colour="red")]),
    "no layout": put("tensors", *WEIGHT, value=10**6),
    "negative layout": put("tensors", *WEIGHT, value=-1),
    "layout of another": lambda body: body["tensors"]["model"].update(
        {"first.weight": body["tensors"]["model"]["second.weight"]}
    ),
    "tensor that no file has": lambda body: body["tensors"]["model"].update(
        {"third": body["tensors"]["model"]["first.bias"]}
    ),
    "tensor left out": lambda body: body["tensors"]["model"].pop("first.bias") and None,
    "state of no parameter": lambda body: body["tensors"]["optim"].update(
        {"first.weight/what": body["tensors"]["optim"]["first.weight/exp_avg"]}
    ),
    "role left out": lambda body: body["tensors"].pop("optim") and None,
    "alias of nothing": put("aliases", "tied", value="nothing"),
    "alias as list": put("aliases", value=["first.weight"]),
    "buffers as text": put("buffers", value="count"),
    "tag as number": put("tag", value=5),
}


def test_no_lie_in_a_manifest_is_believed(honest: Path, tmp_path: Path) -> None:
    outcomes = tell(honest, tmp_path, MANIFEST_LIES, rewrite_manifest)
    for what, (load, whole, collapse) in outcomes.items():
        assert isinstance(load, Raised), what
        assert isinstance(whole, Raised) or what == "tensor left out", what
        # Weights that no lie is about may be read.
        assert isinstance(collapse, Raised) or collapse == "loaded"


def in_chunks(key: str, value: Any) -> Change:
    """Change the header's own table of chunks, which is JSON inside of JSON."""

    def change(entries: dict[str, Any]) -> None:
        chunks = json.loads(entries["__metadata__"]["chunks"])
        chunks["first.weight"][key] = value
        entries["__metadata__"]["chunks"] = json.dumps(chunks)

    return change


HEADER_LIES: dict[str, Change] = {
    "no JSON": lambda _: b"{",
    "no object": lambda _: b"[]",
    "nothing in it": lambda _: b"{}",
    "deep": lambda _: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no metadata": lambda entries: entries.pop("__metadata__") and None,
    "metadata as list": put("__metadata__", value=[]),
    "chunks as number": put("__metadata__", "chunks", value=1),
    "deep chunks": put("__metadata__", "chunks", value="[" * 100_000),
    "no block table": lambda entries: entries.pop("__zero_ckpt_blocks__") and None,
    "block table beyond the end": put(
        "__zero_ckpt_blocks__", "data_offsets", value=[HUGE, HUGE + 8]
    ),
    "block table over the data": put("__zero_ckpt_blocks__", "data_offsets", value=[0, 8]),
    "negative block table": put("__zero_ckpt_blocks__", "data_offsets", value=[-8, 0]),
    "data beyond the end": put("first.weight", "data_offsets", value=[0, HUGE]),
    "data from the end": put("first.weight", "data_offsets", value=[HUGE, HUGE + 256]),
    "negative data": put("first.weight", "data_offsets", value=[-256, 0]),
    "backward data": put("first.weight", "data_offsets", value=[256, 0]),
    "offsets as text": put("first.weight", "data_offsets", value=["0", "256"]),
    "one offset": put("first.weight", "data_offsets", value=[0]),
    "overlapping data": lambda entries: entries["first.bias"].update(
        data_offsets=entries["first.weight"]["data_offsets"]
    ),
    "huge shape": put("first.weight", "shape", value=[HUGE, 8]),
    "shape that overflows": put("first.weight", "shape", value=[1 << 62, 1 << 62]),
    "zero in the shape": put("first.weight", "shape", value=[0, HUGE]),
    "negative shape": put("first.weight", "shape", value=[-8, -8]),
    "another type": put("first.weight", "dtype", value="I32"),
    "unknown type": put("first.weight", "dtype", value="F1024"),
    "type as list": put("first.weight", "dtype", value=["F32"]),
    "entry as number": put("first.weight", value=3),
    "entry left out": lambda entries: entries.pop("first.weight") and None,
    "chunk elsewhere": in_chunks("offset", [8, 0]),
    "chunk outside": in_chunks("offset", [HUGE, 0]),
    "chunk of a huge tensor": in_chunks("shape", [HUGE, 8]),
    "chunk of a small tensor": in_chunks("shape", [4, 8]),
    "chunk of other dimensions": in_chunks("shape", [16, 8, 1]),
    "chunk of another tensor": in_chunks("key", "second.weight"),
    "chunk without a name": in_chunks("key", ["first.weight"]),
    "chunk of another type": in_chunks("dtype", "I32"),
}


def rewrite_model(folder: Path, lie: Change) -> None:
    rewrite_shard(folder, MODEL, lie)


def test_no_lie_in_a_shard_file_s_header_is_believed(honest: Path, tmp_path: Path) -> None:
    outcomes = tell(honest, tmp_path, HEADER_LIES, rewrite_model)
    for what, found in outcomes.items():
        for outcome in found:
            assert isinstance(outcome, Raised), what
            assert outcome.kind == "CorruptShardError", (what, outcome)
            assert MODEL in outcome.text, what


@pytest.mark.parametrize(
    "length", [0, 1, 4087, 1 << 20, (1 << 31) - 1, (1 << 63) + 5, (1 << 64) - 1]
)
def test_a_header_length_that_lies(length: int, honest: Path, tmp_path: Path) -> None:
    """Alone: the length is the first thing that is read of a file."""
    shutil.copytree(honest, tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "tag" / MODEL
    data = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    job = Job.at(1, storage=Fenced())
    with pytest.raises(CorruptCheckpointError, match="header"):
        job.load(tmp_path / "checkpoints", tag="tag")


def entry_lies(state: dict[str, Any]) -> dict[str, Change]:
    """Lies about the entries of the object tree, which only their own file knows of."""
    tree = "objects.json"
    generator = next(name for name in state if name.startswith("rank_objects/"))
    return {
        "no tree": lambda entries: entries.pop(tree) and None,
        "entry left out": lambda entries: entries.pop(generator) and None,
        "huge entry": put(generator, "shape", value=[HUGE]),
        "part of a huge entry": _as_part(generator),
        "trees swapped": _swap(tree, "rank_objects.json"),
    }


def _as_part(name: str) -> Change:
    """Claim that an entry is the start of a tensor that would not fit into any memory."""

    def change(entries: dict[str, Any]) -> None:
        chunks = json.loads(entries["__metadata__"]["chunks"])
        chunks[name] = {"shape": [HUGE], "offset": [0]}
        entries["__metadata__"]["chunks"] = json.dumps(chunks)

    return change


def _swap(one: str, other: str) -> Change:
    def change(entries: dict[str, Any]) -> bytes:
        renamed = {one: other, other: one}
        return json.dumps({renamed.get(name, name): e for name, e in entries.items()}).encode()

    return change


def test_no_lie_about_an_entry_of_the_state_file_is_believed(honest: Path, tmp_path: Path) -> None:
    data = (honest / "tag" / STATE).read_bytes()
    state = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    lies = entry_lies(state)
    outcomes = tell(honest, tmp_path, lies, lambda folder, lie: rewrite_shard(folder, STATE, lie))
    for what, (load, whole, _) in outcomes.items():
        assert isinstance(load, Raised), what
        # Either tree is a whole one; only who knows what belongs into which sees that they were swapped.
        assert isinstance(whole, Raised) or what == "trees swapped", what


def test_the_manifest_s_own_words_reach_the_reader(honest: Path) -> None:
    """The lies above are told about what a real checkpoint says: its keys and layouts are these."""
    body = read_manifest(honest / "tag")
    assert layout_of(body, *WEIGHT)["shape"] == [16, 8]
    assert layout_of(body, *MOMENT)["shape"] == [16, 8]
    assert {MODEL, OPTIM, STATE} < set(body["files"])
