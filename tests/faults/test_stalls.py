"""What stands still without an error: the network to the store, a file system, a rank. Nobody waits for ever.

Each rank that can still run raises after its time limit, names the rank and the phase, and can go on afterwards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from tests.faults.jobs import (
    SHORT,
    Job,
    Raised,
    await_file,
    contents,
    files,
    raised,
    run_many,
    step_saved,
    unlisted,
)
from tests.faults.network import Way, join_over
from tests.told import warned
from tests.workers import Ranks, run_ranks, start_ranks
from zero_ckpt.core.control import Decide
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.store_control import StoreControl
from zero_ckpt.testing import FaultyStorage, Operation

WORLD = 2

PATIENCE = 6.0
"""Seconds. The meetings before one that stalls must succeed in it, with eight jobs on a machine at once."""


class Signs:
    """Files by which a test and its ranks wait for each other."""

    def __init__(self, root: str | Path) -> None:
        self._root = str(root)

    def set(self, name: str) -> None:
        Path(f"{self._root}/{name}").touch()

    def set_here(self, name: str) -> None:
        self.set(f"{name}{dist.get_rank()}")

    def wait(self, name: str) -> None:
        await_file(f"{self._root}/{name}")

    def wait_all(self, name: str) -> None:
        for rank in range(WORLD):
            self.wait(f"{name}{rank}")


# The network


@pytest.fixture
def ways() -> Iterator[list[Way]]:
    """Each rank's way to a store that the test holds."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        yield [stack.enter_context(Way(store.port)) for _ in range(WORLD)]


def call_over_a_stalled_network(
    root: str, ports: list[int]
) -> tuple[list[Raised], list[bool], str]:
    """A save whose network stalls before it, one whose network stalls while it writes, and a load."""
    signs, directory = Signs(root), f"{root}/checkpoints"
    join_over(ports[dist.get_rank()])
    Job.at(1).save(directory, tag="good")

    def stalls_at(name: str) -> None:
        signs.set_here(f"ready {name}")
        signs.wait(f"go {name}")

    def hook(operation: Operation) -> None:
        if operation.name == "finish" and operation.path.endswith(".safetensors"):
            stalls_at("write")

    errors, untouched = [], []
    for name in ("save", "write", "load"):
        storage = FaultyStorage(LocalStorage(), hook) if name == "write" else None
        job = Job.at(2, timeout=PATIENCE, storage=storage)
        if name != "write":
            stalls_at(name)
        before = job.bits()
        call = job.load if name == "load" else job.save
        errors.append(raised(call, directory, **({} if name == "load" else {"tag": "never"})))
        untouched.append(job.bits() == before)
        signs.set_here(f"done {name}")
        signs.wait(f"again {name}")
    path = Job.at(3).save(directory, tag="next")
    job = Job.at(0)
    job.load(directory)
    return errors, untouched, path


@pytest.mark.slow
@pytest.mark.parametrize("stalled", [(0,), (0, 1)], ids=["rank 0", "all ranks"])
def test_a_network_that_stalls_ends_a_call_on_every_rank_and_the_next_works(
    stalled: tuple[int, ...], ways: list[Way], tmp_path: Path
) -> None:
    signs, directory = Signs(tmp_path), tmp_path / "checkpoints"
    ports = [way.port for way in ways]
    with start_ranks(call_over_a_stalled_network, WORLD, str(tmp_path), ports) as ranks:
        for name in ("save", "write", "load"):
            signs.wait_all(f"ready {name}")
            for rank in stalled:
                ways[rank].stall()
            signs.set(f"go {name}")
            signs.wait_all(f"done {name}")
            for rank in stalled:
                ways[rank].go_on()
            signs.set(f"again {name}")
        outcomes = ranks.wait(timeout=60)
    for outcome in outcomes:
        assert outcome.status == "returned", outcome.describe()
        errors, untouched, path = outcome.value
        assert path == f"{directory}/next"
        assert untouched == [True] * 3
        for error, phase in zip(errors, ["save: agree", "save: vote", "load: open"], strict=True):
            assert error.kind == "RankTimeoutError"
            assert error.text.startswith(f"{phase}: "), error.text
            if outcome.rank in stalled:
                lost = f"rank {outcome.rank} lost the rendezvous store"
                assert lost in error.text
                assert "not answer" in error.text
            else:
                assert f"rank {stalled[0]} did not arrive or make progress" in error.text
    assert sorted(set(os.listdir(directory)) - {"never"}) == ["good", "latest", "next"]
    assert not (directory / "never" / "manifest.json").exists()
    assert contents(directory, "good") != contents(directory, "next")
    assert unlisted(directory, "next") == []


# A file system that hangs for one rank, at one operation


@dataclass(frozen=True)
class Hang:
    """`victim` hangs in its first `operation` on a path with `part` in it; the other one then waits in `phase`.

    `after`: the first one after this meeting.
    """

    call: str
    victim: int
    operation: str
    part: str
    phase: str
    commits: bool = False
    after: str = ""


HANGS = [
    Hang("save", 0, "free", "", "save: agree"),
    Hang("save", 1, "create", "/model-", "save: vote"),
    Hang("save", 0, "finish", "/model-", "save: vote"),
    Hang("save", 0, "put", "/manifest.json", "save: vote", commits=True),
    Hang("load", 0, "get", "/latest", "load: open"),
    Hang("load", 1, "open", "/state-", "load: planned"),
    Hang("load", 0, "read", "/model-", "load: verified", after="load: planned"),
    Hang("load", 1, "read", "/model-", "load: done", after="load: verified"),
]


def call_on_a_hanging_disk(root: str, hang: Hang) -> tuple[Raised | str, bool, str]:
    """The victim's disk goes on when the other rank has given up."""
    signs, directory = Signs(root), f"{root}/checkpoints"
    is_victim = dist.get_rank() == hang.victim
    met, meet = {""}, StoreControl.meet

    def noted(
        self: StoreControl, phase: str, record: bytes, decide: Decide, timeout: float
    ) -> bytes:
        answer = meet(self, phase, record, decide, timeout)
        met.add(phase)
        return answer

    def hook(operation: Operation) -> None:
        hangs = operation.name == hang.operation and hang.part in operation.path
        if is_victim and hangs and hang.after in met:
            signs.wait("given up")

    StoreControl.meet = noted  # type: ignore[method-assign]
    job = Job.at(2, storage=FaultyStorage(LocalStorage(), hook), timeout=PATIENCE)
    before = job.bits()
    options = {"tag": "new"} if hang.call == "save" else {}
    ended: Raised | str
    try:
        ended = (job.save if hang.call == "save" else job.load)(directory, **options)
    except TimeoutError as error:
        ended = Raised(type(error).__name__, str(error))
    if not is_victim:
        signs.set("given up")
    untouched = job.bits() == before
    dist.barrier()
    Job.at(3).save(directory, tag="next")
    return ended, untouched, Job.at(0).load(directory)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A directory with the checkpoint `step1` of two ranks."""
    run_ranks(step_saved, WORLD, str(tmp_path / "start"), 1)
    return tmp_path / "start"


@pytest.mark.slow
def test_a_file_system_that_hangs_for_one_rank_is_not_waited_for(start: Path) -> None:
    old = contents(start)
    starts: list[Callable[[], Ranks]] = []
    for number, hang in enumerate(HANGS):
        root = start.with_name(str(number))
        shutil.copytree(start, root / "checkpoints")
        starts.append(partial(start_ranks, call_on_a_hanging_disk, WORLD, str(root), hang))
    for number, (hang, outcomes) in enumerate(zip(HANGS, run_many(starts), strict=True)):
        for outcome in outcomes:
            assert outcome.status == "returned", f"{hang}: {outcome.describe()}"
            assert outcome.value[2] == "next"
        directory = start.with_name(str(number)) / "checkpoints"
        error, untouched, _ = outcomes[1 - hang.victim].value
        assert isinstance(error, Raised), hang
        assert error.kind == "RankTimeoutError"
        told = (
            f"{hang.phase}: rank {hang.victim} did not arrive or make progress for {PATIENCE:g} s"
        )
        assert error.text.startswith(told), (hang, error)
        if hang.phase == "load: done":
            assert "OVERWRITTEN IN PART" in error.text
        else:
            assert untouched, hang
        assert contents(directory, "step1") == old
        tags = {"latest", "next", "step1"} | ({"new"} if hang.commits else set())
        assert set(os.listdir(directory)) == tags, hang
        if hang.commits:
            assert "Whether it was committed is not known here" in error.text
            assert outcomes[hang.victim].value[0] == f"{directory}/new"
            assert unlisted(directory, "new") == []


# A rank that never comes


def load_without(directory: str) -> list[Raised | str]:
    """Each rank in turn skips a load, silently; then all make one."""
    found: list[Raised | str] = []
    for absent in range(WORLD):
        job = Job.at(2, timeout=SHORT)
        before = job.bits()
        if dist.get_rank() != absent:
            found.append(raised(job.load, directory))
        assert job.bits() == before
        dist.barrier()
    return [*found, Job.at(0).load(directory)]


def test_a_rank_that_never_loads_is_named_and_the_next_load_works(start: Path) -> None:
    results = run_ranks(load_without, WORLD, str(start))
    for rank, (error, loaded) in enumerate(results):
        assert isinstance(error, Raised)
        assert error.kind == "RankTimeoutError"
        assert error.text.startswith(f"load: open: rank {1 - rank} did not arrive")
        assert "Nothing was loaded" in error.text
        assert loaded == "step1"


# Pipes, which wait for a writer or a reader for ever, where files belong

READ = ["manifest.json", "model-00001-of-00002.safetensors", "state-00000-of-00002.safetensors"]
WRITTEN = ["step2/manifest.json.tmp", "step2/optim-00001-of-00002.safetensors", "latest.tmp"]


def meet_pipes(directories: list[str]) -> tuple[list[Raised], list[Raised | str], str]:
    loads, saves = [], []
    for directory in directories[: len(READ)]:
        job = Job.at(0)
        before = job.bits()
        loads.append(raised(job.load, directory, tag="step1"))
        assert job.bits() == before
    for directory in directories[len(READ) : -1]:
        try:
            saves.append("; ".join(warned(Job.at(2).save, directory)[1]))
        except OSError as error:
            saves.append(Raised(type(error).__name__, str(error)))
    loaded, texts = warned(Job.at(0).load, directories[-1])
    return loads, saves, f"{loaded}: {'; '.join(texts)}"


def test_a_pipe_in_the_place_of_a_file_stops_no_rank(start: Path) -> None:
    names = [*(f"step1/{name}" for name in READ), *WRITTEN, "latest"]
    directories = [start.with_name(str(number)) for number in range(len(names))]
    for name, directory in zip(names, directories, strict=True):
        shutil.copytree(start, directory)
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)
    results = run_ranks(meet_pipes, WORLD, [str(directory) for directory in directories])
    assert results[0][0] == results[1][0]
    assert results[0][1][:2] == results[1][1][:2]
    loads, saves, latest = results[0]
    assert [error.kind for error in loads] == ["CorruptManifestError", *["CorruptShardError"] * 2]
    for name, error in zip(names, loads, strict=False):
        assert name in error.text
    for name, saved in zip(WRITTEN[:2], saves, strict=False):
        assert isinstance(saved, Raised)
        assert f"{name}: a pipe, a socket or a device, and no file" in saved.text
        assert "Nothing was committed" in saved.text
    assert isinstance(saves[2], str)
    assert "step2 is committed and durable, but what follows a commit failed" in saves[2]
    assert latest.startswith("step1: falling back to")
    old = contents(start, "step1")
    for directory in directories[len(READ) :]:
        assert contents(directory, "step1") == old
        assert [name for name in files(directory) if name.endswith(".tmp")] == []
