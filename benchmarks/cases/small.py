"""Very many small tensors: where the cost per tensor decides, not the disk."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.job import Act, Job
from benchmarks.limits import RawFiles, Way
from benchmarks.measure import interleave, make_cold, remove_and_settle
from benchmarks.peers import best_thread_count, dcp_load, dcp_save
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_least, faster
from benchmarks.workload import build_small

RANKS = 2
WAY = Way(block=4 << 20, streams=1)


def small(bench: Bench) -> list[Row]:
    measured = bench.launch(RANKS, _measure)
    count = f"{bench.options.small_tensors:,} x 4 KiB per rank"
    save, load = f"save {count}", f"load cold {count}"
    return [
        faster("small", save, measured, "save ours", "save dcp", at_least(20)),
        faster("small", save, measured, "save ours", "save raw"),
        faster("small", load, measured, "load ours", "load dcp", at_least(20)),
        faster("small", load, measured, "load ours", "load raw"),
    ]


def _measure(rank: Rank) -> Measured:
    job = Job(rank, build_small)
    raw = RawFiles(rank, job.local_bytes)
    threads = best_thread_count(rank, job.state, rank.scratch / "trial")
    saves: dict[str, Act] = {
        "raw": lambda directory: raw.write(directory, WAY),
        "ours": job.ours.save,
        "dcp": lambda directory: dcp_save(job.state, directory, threads),
    }
    loads: dict[str, Act] = {
        "raw": lambda directory: raw.read(raw.file(directory), WAY),
        "ours": job.ours.load,
        "dcp": lambda directory: dcp_load(job.state, directory),
    }
    savers = [job.saving(f"save {name}", act) for name, act in saves.items()]
    measured = interleave(rank, savers, warm_up=1)
    for name, act in saves.items():
        act(rank.scratch / name)
        rank.barrier()
    for name in ("ours", "dcp"):
        job.checked_load(name, rank.scratch / name, loads[name])
    loaders = [
        job.loading(f"load {name}", rank.scratch / name, act, make_cold)
        for name, act in loads.items()
    ]
    measured.extend(interleave(rank, loaders, warm_up=0))
    measured.labels = {
        "save dcp": f"DCP, {threads} thread(s)",
        "load dcp": "DCP",
        "save raw": f"raw write, {WAY}",
        "load raw": f"raw read, {WAY}",
    }
    rank.on_first(lambda: remove_and_settle(*(rank.scratch / name for name in saves)))
    return measured
