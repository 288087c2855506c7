"""The first save of a process against its third, and the host memory that a save needs.

Buffers are new in the first save and their memory comes page by page. Every sample is a new launch.
"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.job import Act, Job
from benchmarks.measure import peak_memory
from benchmarks.peers import dcp_save, torch_save
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_most, bounded, slowdown
from benchmarks.workload import build_large

RANKS = 2
MEMORY_GOAL = 256  # MB per rank


def first(bench: Bench) -> list[Row]:
    measured = Measured()
    for _ in range(bench.options.repeats):
        measured.extend(bench.launch(RANKS, _measure))
    memory = "memory of a save, per rank"
    return [
        slowdown("first", "first save", measured, "save 1", "save 3", at_most(1.2)),
        bounded("first", memory, measured, "ours memory", "dcp memory", MEMORY_GOAL),
        bounded("first", memory, measured, "ours memory", "torch memory", MEMORY_GOAL),
    ]


def _measure(rank: Rank) -> Measured:
    job = Job(rank, build_large)
    measured = Measured(labels={"save 3": "third save", "dcp memory": "DCP, 1 thread"})
    measured.labels["torch memory"] = "torch.save"

    def step(name: str, save: Act) -> float:
        """One save; its seconds go into `measured`, its extra memory in bytes is returned."""
        contestant = job.saving(name, save)
        with peak_memory() as peak:
            measured.add(name, rank.timed(lambda: contestant.run(0)))
        contestant.clean(0)
        rank.say(f"{name}: {measured.samples[name][-1]:.3f} s")
        return rank.largest(peak.extra)

    measured.add("ours memory", max(step(f"save {turn}", job.ours.save) for turn in (1, 2, 3)))
    dcp = step("dcp", lambda directory: dcp_save(job.state, directory, 1))
    measured.add("dcp memory", dcp)
    torch = step("torch", lambda directory: torch_save(job.parts, directory, rank.rank))
    measured.add("torch memory", torch)
    return measured
