"""The fp32 export of a sharded checkpoint, offline, in one process, against `cp` of what it writes.

Every sample is a new process: its imports come before the clock and the memory's baseline.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks import ours, peers
from benchmarks.bench import Bench
from benchmarks.job import Job
from benchmarks.limits import copy_durably
from benchmarks.measure import make_cold, make_warm, peak_memory, remove_and_settle, rotated
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_least, bounded, faster
from benchmarks.workload import build_large, check_export

RANKS = 2
MEMORY_GOAL = 512  # MB above import
Export = Callable[[Path, Path], None]


def collapse(bench: Bench) -> list[Row]:
    scratch = bench.scratch
    bench.launch(RANKS, _save)
    ours.collapse(scratch / "ours", scratch / "model.safetensors")
    check_export(scratch / "model.safetensors")
    ways: dict[str, tuple[Path, Export]] = {
        "ours": (scratch / "ours", ours.collapse),
        "cp": (scratch / "model.safetensors", copy_durably),
        "dcp": (scratch / "dcp", peers.dcp_collapse),
    }
    measured = _measure(ways, scratch / "output.safetensors", bench.options.repeats)
    measured.labels = {
        **{f"{kind} cp": "cp + fsync of the output" for kind in ("cold", "warm")},
        **{f"{kind} dcp": "DCP, of a model alone" for kind in ("cold", "warm")},
        "dcp memory": "DCP, of a model alone",
    }
    for name in ("ours", "dcp", "model.safetensors"):
        remove_and_settle(scratch / name)
    memory = "memory of a collapse, above import"
    return [
        faster("collapse", "collapse, cold", measured, "cold ours", "cold cp", at_least(0.9)),
        faster("collapse", "collapse, cold", measured, "cold ours", "cold dcp"),
        faster("collapse", "collapse, warm", measured, "warm ours", "warm cp"),
        faster("collapse", "collapse, warm", measured, "warm ours", "warm dcp"),
        bounded("collapse", memory, measured, "ours memory", "dcp memory", MEMORY_GOAL),
    ]


def _save(rank: Rank) -> Measured:
    job = Job(rank, build_large)
    job.ours.save(rank.scratch / "ours")
    model_only = {name: tensor for name, tensor in job.state.items() if "/" not in name}
    peers.dcp_save(model_only, rank.scratch / "dcp", threads=1)
    return Measured()


def _measure(ways: dict[str, tuple[Path, Export]], output: Path, repeats: int) -> Measured:
    measured = Measured()
    for turn in range(repeats):
        for kind, bring in (("cold", make_cold), ("warm", make_warm)):
            for name, (source, export) in rotated(list(ways.items()), turn):
                bring(source)
                seconds, extra = _in_new_process(export, source, output)
                remove_and_settle(output)
                measured.add(f"{kind} {name}", seconds)
                measured.add(f"{name} memory", extra)
                print(f"  round {turn}: {kind} {name} {seconds:.3f} s", file=sys.stderr, flush=True)
    return measured


def _in_new_process(export: Export, source: Path, output: Path) -> tuple[float, int]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_export, export, source, output).result()


def _export(export: Export, source: Path, output: Path) -> tuple[float, int]:
    """Seconds, and bytes of memory above what there was before."""
    with peak_memory() as peak:
        start = time.perf_counter()
        export(source, output)
        seconds = time.perf_counter() - start
    return seconds, peak.extra
