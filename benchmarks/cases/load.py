"""A verified load of the large model: from the disk (cold), from the page cache (warm).

Into a new job, whose model is there and whose optimizer has no state yet; and in place, over live weights and live Adam
state, where all that changes is verified before the first byte of it does, unless `verify_first=False`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.bench import Bench
from benchmarks.job import Act, Job
from benchmarks.limits import RawFiles, Way, touched_buffer
from benchmarks.measure import Contestant, interleave, make_cold, make_warm, remove_and_settle
from benchmarks.peers import dcp_load, dcp_save, torch_load, torch_save
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_least, bounded, faster
from benchmarks.workload import build_large

RANKS = 2
WARM_WAY = Way(block=1 << 20, streams=1, direct=False)


def load(bench: Bench) -> list[Row]:
    measured = bench.launch(RANKS, _measure)
    cold, warm = (f"load {kind}, {measured.labels['size']}" for kind in ("cold", "warm"))
    memory = "memory of a load, per rank"

    def row(what: str, name: str, peer: str, goal: float | None = None) -> Row:
        return faster("load", what, measured, name, peer, goal and at_least(goal))

    return [
        row(f"{cold}, new job", "cold new", "cold raw", 0.9),
        row(f"{cold}, verify_first=False", "cold once", "cold raw", 0.9),
        row(f"{cold}, in place", "cold ours", "cold raw"),
        row(f"{cold}, new job", "cold new", "cold kept"),
        row(f"{cold}, verify_first=False", "cold once", "cold kept"),
        row(f"{cold}, in place", "cold ours", "cold dcp"),
        row(f"{cold}, in place", "cold ours", "cold torch"),
        row(f"{warm}, new job", "warm new", "warm dcp", 3),
        row(f"{warm}, verify_first=False", "warm once", "warm dcp", 3),
        row(f"{warm}, in place", "warm ours", "warm dcp"),
        row(f"{warm}, in place", "warm ours", "warm torch"),
        row(f"{warm}, in place", "warm ours", "warm raw"),
        bounded("load", memory, measured, "ours memory", "dcp memory", None),
        bounded("load", memory, measured, "ours memory", "torch memory", None),
    ]


def _measure(rank: Rank) -> Measured:
    job = Job(rank, build_large)
    raw = RawFiles(rank, job.local_bytes)
    _save(job, raw)
    loads: dict[str, Act] = {
        "ours": job.ours.load,
        "dcp": lambda directory: dcp_load(job.state, directory),
        "torch": lambda directory: torch_load(job.parts, directory, rank.rank),
    }
    measured = Measured()
    for name, act in loads.items():
        measured.add(f"{name} memory", job.checked_load(name, rank.scratch / name, act))
    file = raw.file(rank.scratch / "raw")
    cold_ways = [raw.best_way_to_read(file, direct=direct) for direct in (True, False)]
    for kind, ways, bring in (("cold", cold_ways, make_cold), ("warm", [WARM_WAY], make_warm)):
        contestants = [
            job.loading(f"{kind} {name}", rank.scratch / name, act, bring)
            for name, act in loads.items()
        ]
        once = job.loading(f"{kind} once", rank.scratch / "ours", job.ours.load_once, bring)
        new = job.resuming(f"{kind} new", rank.scratch / "ours", job.ours.load, bring)
        contestants += [once, new]
        for way in ways:
            act = partial(_read, raw, way)
            contestants.append(job.loading(_raw(kind, way), rank.scratch / "raw", act, bring))
        if kind == "cold":
            contestants.append(_keeping(job, raw, cold_ways[0]))
        measured.extend(interleave(rank, contestants, warm_up=0))
        _take_fastest(measured, kind, ways)
    measured.labels |= _labels(raw.size * rank.world_size)
    rank.on_first(lambda: remove_and_settle(*(rank.scratch / name for name in ("raw", *loads))))
    return measured


def _read(raw: RawFiles, way: Way, directory: Path) -> None:
    raw.read(raw.file(directory), way)


def _keeping(job: Job, raw: RawFiles, way: Way) -> Contestant:
    """Raw reads that keep all they read, in memory that is there: closer to what a load can reach than one buffer."""
    memory: list[memoryview] = []

    def act(directory: Path) -> None:
        raw.read(raw.file(directory), way, into=memory[0])

    kept = job.loading("cold kept", job.rank.scratch / "raw", act, make_cold)

    def prepare(turn: int) -> None:
        kept.prepare(turn)
        memory.append(touched_buffer(raw.size))

    return Contestant(kept.name, kept.run, prepare=prepare, clean=lambda _turn: memory.clear())


def _raw(kind: str, way: Way) -> str:
    return f"{kind} raw read, {way}"


def _take_fastest(measured: Measured, kind: str, ways: list[Way]) -> None:
    """The limit is what the faster of the ways does, direct or buffered."""
    best = min(ways, key=lambda way: median(measured.samples[_raw(kind, way)]))
    measured.samples[f"{kind} raw"] = measured.samples[_raw(kind, best)]
    measured.labels[f"{kind} raw"] = f"raw read, {best}"


def _save(job: Job, raw: RawFiles) -> None:
    scratch, rank = job.rank.scratch, job.rank.rank
    raw.write(scratch / "raw", Way(block=4 << 20, streams=1))
    job.ours.save(scratch / "ours")
    dcp_save(job.state, scratch / "dcp", threads=1)
    torch_save(job.parts, scratch / "torch", rank)
    job.rank.barrier()


def _labels(size: int) -> dict[str, str]:
    return {
        "size": f"{size / 1e9:.2f} GB",
        "cold kept": "raw reads that keep all",
        "cold dcp": "DCP",
        "cold torch": "torch.load",
        "warm dcp": "DCP",
        "warm torch": "torch.load",
        "dcp memory": "DCP",
        "torch memory": "torch.load",
    }
