"""Planning at scale: what one rank of thousands does before it writes, or reads, its first byte.

Each sample is a new process that takes itself for one rank of a job (torch's fake process group), with
a 405B decoder of 6,060 tensors on its meta-sized share. Manifest and shard headers are those that a
save of that size writes; see `simulation`. Loads count everything from the manifest's bytes on.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.bench import Bench
from benchmarks.measure import peak_memory
from benchmarks.ranks import Measured
from benchmarks.simulation import MODELS, HeaderStorage, Sharding, fsdp, hybrid, table_of
from benchmarks.table import Row, at_most, bounded, timed_alone
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.collector import collector_paused
from zero_ckpt.core.layout import Layout, Table, local_box
from zero_ckpt.core.naming import parameter_names
from zero_ckpt.core.optimizers import plan_optimizer
from zero_ckpt.core.planner import needed_chunks, plan_save
from zero_ckpt.core.reader import ReadPlan
from zero_ckpt.core.restoring import plan_model
from zero_ckpt.core.state import capture_model, capture_optimizer

SECONDS_GOAL, MEMORY_GOAL = 1.0, 200
FOLDER = "/simulated/t"


def plan(bench: Bench) -> list[Row]:
    saved_at, fewer = (64, 16) if bench.options.smoke else (4096, 1024)
    replicas = saved_at // 512 or 2
    mixed = hybrid(replicas, saved_at // 8 // replicas, 8)
    even = fsdp(saved_at)
    jobs = {
        f"{saved_at:,} ranks, FSDP2": (even, even),
        f"{saved_at:,} ranks, {mixed.name}": (mixed, mixed),
        f"{saved_at:,} -> {fewer:,} ranks": (even, fsdp(fewer)),
    }
    rows = []
    model = "7B" if bench.options.smoke else "405B"
    for what, (saved, live) in jobs.items():
        measured = Measured()
        for turn in range(bench.options.repeats):
            measured.extend(_in_new_process(_measure, model, saved, live))
            print(f"  round {turn}: {what} {measured.samples['load'][-1]:.3f} s", file=sys.stderr)
        load = f"plan of a load, {what}"
        rows += [
            timed_alone("plan", load, measured, "load", at_most(SECONDS_GOAL)),
            bounded("plan", f"memory, {load}", measured, "memory", None, MEMORY_GOAL),
        ]
        if saved == live:
            rows.append(timed_alone("plan", f"plan of a save, {what}", measured, "save"))
    return rows


def _in_new_process(work: Callable[..., Measured], *args: object) -> Measured:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *args).result()


def _measure(model_name: str, saved: Sharding, live: Sharding) -> Measured:
    """One rank's plans. It is in the middle of the job, so that all its boxes have elements."""
    rank = live.ranks // 4 + 3
    dist.init_process_group("fake", rank=rank, world_size=live.ranks, store=FakeStore())
    table = table_of(MODELS[model_name], saved)
    alive = table_of(MODELS[model_name], live)
    needed = _needed_ranks(alive, table, saved.ranks, rank)
    storage = HeaderStorage(table, saved.ranks, needed)
    model, optimizer = _build(alive, live, rank)
    measured = Measured()
    with peak_memory() as peak:
        start = time.perf_counter()
        reads = _plan_load(storage, model, optimizer, rank)
        measured.add("load", time.perf_counter() - start)
    assert {file.reader.name for plan in reads for file in plan.files}
    measured.add("memory", peak.extra)
    start = time.perf_counter()
    table.digest()
    made = plan_save([(table, range(saved.ranks))])
    for role in table.roles:
        list(made.chunks_of(rank % saved.ranks, role))
    measured.add("save", time.perf_counter() - start)
    return measured


def _plan_load(
    storage: HeaderStorage, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int
) -> list[ReadPlan]:
    """What a load does on each rank before it reads tensors; only the objects are left out."""
    with collector_paused():
        return _planned(storage, model, optimizer, rank)


def _planned(
    storage: HeaderStorage, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int
) -> list[ReadPlan]:
    names = parameter_names(model)
    checkpoint = Checkpoint(storage, FOLDER)
    restoration = plan_model(checkpoint, capture_model(model), rank)
    record = capture_optimizer(optimizer, names).record
    restoration.add(plan_optimizer(checkpoint, optimizer, names, record, rank))
    reads = [checkpoint.plan_reads(part) for part in (restoration.live, restoration.fresh)]
    for each in reads:
        each.digests()
    return reads


def _needed_ranks(live: Table, saved: Table, ranks: int, rank: int) -> set[int]:
    """The ranks whose files hold something of what `rank` of the live job wants."""
    roles = plan_save([(saved, range(ranks))]).roles
    wanted = {
        id(placed): (placed, _box(live.roles[role][key], rank))
        for role, keys in roles.items()
        for key, placed in keys.items()
    }
    return {owner for placed, box in wanted.values() for owner, _ in needed_chunks(placed, box)}


def _box(layout: Layout, rank: int) -> Box:
    if layout.mesh is None:
        return full_box(layout.shape)
    coordinates = dict(layout.mesh.coordinates())
    return local_box(layout.shape, layout.mesh.shape, layout.placements, coordinates[rank])


def _build(table: Table, sharding: Sharding, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The rank's part of the model, in memory that is never touched, and an optimizer without state."""
    mesh = init_device_mesh("cpu", sharding.mesh)
    root = nn.Module()
    for key, layout in table.roles["model"].items():
        *path, name = key.split(".")
        module = root
        for child in path:
            if not hasattr(module, child):
                module.add_module(child, nn.Module())
            module = getattr(module, child)
        part = torch.empty(_box(layout, rank).shape)
        module.register_parameter(name, nn.Parameter(_dtensor(part, layout, mesh)))
    return root, torch.optim.AdamW(root.parameters())


def _dtensor(part: torch.Tensor, layout: Layout, mesh: DeviceMesh) -> DTensor:
    placements = [_placement(name, layout, i) for i, name in enumerate(layout.placements)]
    stride = torch.empty(layout.shape, device="meta").stride()
    shape = torch.Size(layout.shape)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def _placement(name: str, layout: Layout, index: int) -> Placement:
    if name == "R":
        return Replicate()
    if name[0] == "S":
        return Shard(int(name[1:]))
    behind = zip(layout.placements[index + 1 :], layout.mesh.shape[index + 1 :], strict=True)
    factor = prod(n for other, n in behind if other[1:] == name[1:])
    return _StridedShard(int(name[1:]), split_factor=factor)
