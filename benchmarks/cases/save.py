"""A synchronous save of the large model, durable and checksummed, against disk and peers."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.job import Job
from benchmarks.limits import RawFiles
from benchmarks.measure import interleave
from benchmarks.peers import best_thread_count, dcp_save, torch_save
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_least, faster
from benchmarks.workload import build_large

RANKS = 2


def save(bench: Bench) -> list[Row]:
    measured = bench.launch(RANKS, _measure)
    what = f"save, {measured.labels['size']}, {RANKS} ranks"
    return [
        faster("save", what, measured, "ours", "raw", at_least(0.9)),
        faster("save", what, measured, "ours", "dcp", at_least(2.5)),
        faster("save", what, measured, "ours", "torch"),
    ]


def _measure(rank: Rank) -> Measured:
    job = Job(rank, build_large)
    raw = RawFiles(rank, job.local_bytes)
    way = raw.best_way_to_write(rank.scratch / "trial")
    threads = best_thread_count(rank, job.state, rank.scratch / "trial")
    contestants = [
        job.saving("raw", lambda directory: raw.write(directory, way)),
        job.saving("ours", job.ours.save),
        job.saving("dcp", lambda directory: dcp_save(job.state, directory, threads)),
        job.saving("torch", lambda directory: torch_save(job.parts, directory, rank.rank)),
    ]
    measured = interleave(rank, contestants, warm_up=1)  # "from the second save on"
    measured.labels = {
        "size": f"{raw.size * rank.world_size / 1e9:.2f} GB",
        "raw": f"raw write, {way}",
        "dcp": f"DCP, {threads} thread(s)",
        "torch": "torch.save + fsync",
    }
    return measured
