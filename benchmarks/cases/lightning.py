"""Lightning's own sharded checkpoint (`ModelParallelStrategy`, through Fabric) beside ours, of the same model.

Lightning's save is not durable when it returns, and its load is not verified; ours are.
"""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn

from benchmarks.bench import Bench
from benchmarks.job import Act, Job
from benchmarks.measure import interleave, make_cold, make_warm, remove_and_settle
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, faster
from benchmarks.workload import build_large

RANKS = 2


def lightning(bench: Bench) -> list[Row]:
    measured = bench.launch(RANKS, _measure)
    measured.labels = dict.fromkeys(measured.samples, "Lightning, ModelParallelStrategy")
    return [
        faster("lightning", what, measured, f"{what} ours", f"{what} theirs")
        for what in ("save", "load cold", "load warm")
    ]


def _measure(rank: Rank) -> Measured:
    job = Job(rank, build_large)
    fabric, state = _fabric(job)
    saves: dict[str, Act] = {
        "ours": job.ours.save,
        "theirs": lambda directory: fabric.save(directory, state),
    }
    loads: dict[str, Act] = {
        "ours": job.ours.load,
        "theirs": lambda directory: fabric.load(directory, state),
    }
    measured = interleave(rank, [job.saving(f"save {name}", act) for name, act in saves.items()])
    for name, act in saves.items():
        act(rank.scratch / name)
        rank.barrier()
        job.checked_load(name, rank.scratch / name, loads[name])
    for kind, bring in (("cold", make_cold), ("warm", make_warm)):
        loaders = [
            job.loading(f"load {kind} {name}", rank.scratch / name, act, bring)
            for name, act in loads.items()
        ]
        measured.extend(interleave(rank, loaders, warm_up=0))
    rank.on_first(lambda: remove_and_settle(*(rank.scratch / name for name in saves)))
    return measured


def _fabric(job: Job) -> tuple[Fabric, dict[str, Any]]:
    """On the ranks' process group; the model is sharded already."""
    rank = job.rank
    os.environ |= {
        "LOCAL_RANK": str(rank.rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(rank.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # never used: the group exists
    }
    strategy = ModelParallelStrategy(_as_it_is, rank.world_size, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=rank.world_size, strategy=strategy)
    fabric.launch()
    model, optimizer = fabric.setup(job.model, job.optimizer)
    return fabric, {"model": model, "optimizer": optimizer}


def _as_it_is(model: nn.Module, device_mesh: object) -> nn.Module:
    return model
