"""The commit at scale: what rank 0 does for all ranks, in one save of thousands of ranks. No data.

The files of the ranks exist, as holes of their lengths; votes, tables, manifest and clean-up are real.
The meeting is a real one over a TCP store: requests lie in it, and rank 0 claims and answers each; a
process of its own polls as often as that many waiting ranks do.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.bench import Bench
from benchmarks.measure import remove_and_settle
from benchmarks.ranks import Measured
from benchmarks.simulation import CHECKSUM, MODELS, fsdp, table_of
from benchmarks.table import Row, at_most, timed_alone
from zero_ckpt.core.agreement import Agreement, Proposal, agree
from zero_ckpt.core.commit import CommitRequest, Vote
from zero_ckpt.core.commit import commit as commit_votes
from zero_ckpt.core.layout import ROLES
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.manifest import FileRecord, shard_name
from zero_ckpt.core.planner import plan_save
from zero_ckpt.core.store_control import StoreControl, longest_pause

GOAL = 2.0
HEADER = {"step": 1, "zero_stage": 3, "buffers": [], "frozen": [], "excluded": [], "aliases": {}}


def commit(bench: Bench) -> list[Row]:
    ranks = 64 if bench.options.smoke else 4096
    measured = Measured()
    for turn in range(bench.options.repeats):
        _save(bench.scratch / "simulated", ranks, measured)
        _meet(ranks, measured)
        parts = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in measured.samples.items())
        print(f"  round {turn}: {parts}", file=sys.stderr, flush=True)
    total = zip(*(measured.samples[name] for name in ("agree", "commit", "meeting")), strict=True)
    measured.samples["all"] = [agree + commit + 2 * meeting for agree, commit, meeting in total]
    what = f"rank 0 of {ranks:,} in a save"
    return [
        timed_alone("commit", f"{what}: all", measured, "all", at_most(GOAL)),
        timed_alone("commit", f"{what}: agree", measured, "agree"),
        timed_alone("commit", f"{what}: check, manifest, clean-up", measured, "commit"),
        timed_alone("commit", f"{what}: one meeting", measured, "meeting"),
    ]


def _save(directory: Path, ranks: int, measured: Measured) -> None:
    """The decisions of rank 0, over the second save of a tag: files of the first are removed."""
    storage = LocalStorage()
    table = table_of(MODELS["405B"], fsdp(ranks))
    plan = plan_save([(table, range(ranks))])
    proposal = Proposal(str(directory), "t", 1, table.digest(), 1, 1)
    for generation in (1, 2):
        _make_files(directory / "t", ranks, generation)
        start = time.perf_counter()
        agreement = agree(storage, [proposal.to_bytes()] * ranks, "warn", lambda _: False)
        agreement = Agreement.from_bytes(agreement.to_bytes())
        agreed = time.perf_counter()
        votes = [_vote(rank, ranks, generation) for rank in range(ranks)]
        begin = time.perf_counter()
        request = CommitRequest(agreement, plan, HEADER, True, None)
        assert commit_votes(storage, request, votes) == ""
        done = time.perf_counter()
    measured.add("agree", agreed - start)
    measured.add("commit", done - begin)
    remove_and_settle(directory)


def _make_files(folder: Path, ranks: int, generation: int) -> None:
    """What the ranks have written, without data: holes take no room."""
    folder.mkdir(parents=True, exist_ok=True)
    for role in ROLES:
        for rank in range(ranks):
            descriptor = os.open(
                folder / shard_name(role, rank, ranks, generation), os.O_CREAT | os.O_WRONLY
            )
            os.ftruncate(descriptor, _LENGTH)
            os.close(descriptor)


_LENGTH = 1 << 32


def _vote(rank: int, ranks: int, generation: int) -> bytes:
    names = (shard_name(role, rank, ranks, generation) for role in ROLES)
    files = dict.fromkeys(names, FileRecord(_LENGTH, CHECKSUM))
    return Vote(files, {"write": 1.0, "fsync": 0.1}).to_bytes()


def _meet(ranks: int, measured: Measured) -> None:
    """Rank 0's part of a meeting whose other ranks have all arrived and wait."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    control = StoreControl(dist.TCPStore("127.0.0.1", store.port), 0, ranks)
    vote = _vote(1, ranks, 1)
    for rank in range(1, ranks):
        store.set(control._at(f"request/{rank}"), b'["%d", "save: vote"]\n' % rank + vote)
    answer = Agreement("/checkpoints", "t", 1, [list(range(ranks))]).to_bytes()
    stop = multiprocessing.get_context("spawn").Event()
    waiting = multiprocessing.get_context("spawn").Process(
        target=_wait, args=(store.port, control._at("answer/none"), ranks, stop)
    )
    waiting.start()
    time.sleep(1)  # it imports torch
    start = time.perf_counter()
    control.meet("save: vote", vote, lambda records: answer, 60)
    measured.add("meeting", time.perf_counter() - start)
    stop.set()
    waiting.join()


def _wait(port: int, key: str, ranks: int, stop: Any) -> None:
    """Polls as often as all waiting ranks together."""
    store = dist.TCPStore("127.0.0.1", port)
    burst = 20
    while not stop.is_set():
        for _ in range(burst):
            store.check([key])
        time.sleep(burst * longest_pause(ranks) / ranks)
