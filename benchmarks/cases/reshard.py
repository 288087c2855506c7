"""Loads at another world size than saved at, against the load at the same one."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.job import Job
from benchmarks.limits import RawFiles, Way
from benchmarks.measure import Contestant, interleave, make_cold, remove_and_settle
from benchmarks.peers import dcp_load, dcp_save
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_most, faster, slowdown
from benchmarks.workload import build_large

GOAL = 1.2
WAY = Way(block=4 << 20, streams=1)


def reshard(bench: Bench) -> list[Row]:
    for ranks in (2, 4):
        bench.launch(ranks, _save)
    rows = []
    for saved_at, ranks in ((4, 2), (2, 4)):
        measured = bench.launch(ranks, _load, saved_at)
        what = f"load cold, {saved_at} -> {ranks} ranks"
        moved, same = f"ours {saved_at}", f"ours {ranks}"
        rows += [
            slowdown("reshard", what, measured, moved, same, at_most(GOAL)),
            faster("reshard", what, measured, moved, f"dcp {saved_at}"),
            faster("reshard", what, measured, moved, "raw"),
        ]
    remove_and_settle(*bench.scratch.iterdir())
    return rows


def _save(rank: Rank) -> Measured:
    job, ranks = Job(rank, build_large), rank.world_size
    job.ours.save(rank.scratch / f"ours {ranks}")
    dcp_save(job.state, rank.scratch / f"dcp {ranks}", threads=1)
    RawFiles(rank, job.local_bytes).write(rank.scratch / f"raw {ranks}", WAY)
    return Measured()


def _load(rank: Rank, saved_at: int) -> Measured:
    job, ranks = Job(rank, build_large), rank.world_size
    raw, raw_directory = RawFiles(rank, job.local_bytes), rank.scratch / f"raw {ranks}"

    def ours(saved: int) -> Contestant:
        directory = rank.scratch / f"ours {saved}"
        job.checked_load(f"ours {saved}", directory, job.ours.load)
        return job.loading(f"ours {saved}", directory, job.ours.load, make_cold)

    contestants = [
        ours(ranks),
        ours(saved_at),
        job.loading(
            f"dcp {saved_at}",
            rank.scratch / f"dcp {saved_at}",
            lambda directory: dcp_load(job.state, directory),
            make_cold,
        ),
        job.loading(
            "raw",
            raw_directory,
            lambda directory: raw.read(raw.file(directory), WAY),
            make_cold,
        ),
    ]
    measured = interleave(rank, contestants, warm_up=0)
    measured.labels = {
        f"ours {ranks}": f"saved at {ranks} ranks",
        f"dcp {saved_at}": f"DCP, {saved_at} -> {ranks} ranks",
        "raw": f"raw read, {WAY}",
    }
    return measured
