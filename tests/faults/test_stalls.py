"""What stands still without an error: the network to the store, a file system, a rank. Nobody waits for ever.

Each rank that can still run raises after its time limit, names the rank and the phase, and can go on afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from tests.faults.jobs import SHORT, Job, Raised, await_file, contents, raised, unlisted
from tests.faults.network import Way, join_over
from tests.workers import start_ranks
from zero_ckpt.core.storage import LocalStorage
from zero_ckpt.testing import FaultyStorage, Operation

WORLD = 2


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
        job = Job.at(2, timeout=SHORT, storage=storage)
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
