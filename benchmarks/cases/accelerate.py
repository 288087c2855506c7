"""`save_state` and `load_state` of one accelerator, attached to zero_ckpt and as Accelerate has them.

The same prepared model and optimizer are saved and loaded both ways, in turns: `attach` and `detach`
only change the accelerator's class. Accelerate's saves are not durable and its loads not verified;
ours are, so its save is measured with fsync of its files, too. With `async_save` the clock stops
when the training may make its next step; nothing is computed meanwhile under which the copy could
hide. Accelerate takes no FSDP plugin on a CPU, so its state is told that it has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from benchmarks.bench import Bench
from benchmarks.measure import (
    Contestant,
    files_under,
    interleave,
    make_cold,
    make_warm,
    peak_memory,
    remove_and_settle,
    sync,
)
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_least, at_most, bounded, faster, slowdown
from benchmarks.workload import Model, check, fill, wipe
from zero_ckpt.accelerate import attach, detach

RANKS = 2
GOAL = 3.0
STEPS = 40  # in one sample of the cost of a training step


def accelerate(bench: Bench) -> list[Row]:
    rows = []
    for engine in ("DDP", "FSDP2"):
        measured = bench.launch(RANKS, _measure, engine)
        measured.labels = dict.fromkeys(measured.samples, f"Accelerate, {engine}")
        for what in ("save", "load cold", "load warm"):
            row = f"{what.replace('save', 'save_state').replace('load', 'load_state')}, {engine}"
            ours, theirs = f"{what} ours", f"{what} theirs"
            rows.append(faster("accelerate", row, measured, ours, theirs, at_least(GOAL)))
        rows += _beside_rows(bench.launch(RANKS, _measure_beside, engine), engine)
        for what in ("save", "load"):
            row = f"memory of {what}_state, {engine}, per rank"
            names = f"{what} memory ours", f"{what} memory theirs"
            rows.append(bounded("accelerate", row, measured, *names, None))
    steps = bench.launch(RANKS, _measure_steps)
    steps.labels = {"plain": "not attached"}
    what = f"{STEPS} training steps"
    rows.append(slowdown("accelerate", what, steps, "attached", "plain", at_most(1.02)))
    return rows


def _beside_rows(measured: Measured, engine: str) -> list[Row]:
    measured.labels = {
        "theirs": f"Accelerate, {engine}",
        "theirs, fsync": f"Accelerate, {engine}, fsync",
    }
    row = f"save_state, {engine}"
    beside = f"{row}, async_save: until the next step"
    return [
        faster("accelerate", row, measured, "ours", "theirs, fsync", at_least(GOAL)),
        faster("accelerate", beside, measured, "ours, async", "theirs", at_least(GOAL)),
    ]


@dataclass(frozen=True, slots=True)
class _Job:
    """One prepared accelerator with filled state."""

    rank: Rank
    accelerator: Any
    model: Any
    optimizer: Any

    def act(self, side: str, action: Callable[[], object]) -> Callable[[int], None]:
        """`action`, with the accelerator attached (`ours`) or not (`theirs`)."""

        def run(_turn: int) -> None:
            if side == "ours":
                attach(self.accelerator, export=False)
            try:
                action()
            finally:
                if side == "ours":
                    detach(self.accelerator)

        return run

    def saving(self, side: str) -> Contestant:
        directory = self.rank.scratch / f"saved {side}"

        def clean(_turn: int) -> None:
            self.rank.on_first(lambda: remove_and_settle(directory))

        run = self.act(side, lambda: self.accelerator.save_state(str(directory)))
        return Contestant(f"save {side}", run, clean=clean)

    def loading(self, side: str, kind: str, bring: Callable[[Path], None]) -> Contestant:
        directory = self.rank.scratch / f"kept {side}"

        def prepare(_turn: int) -> None:
            wipe(self.model, self.optimizer)
            self.rank.on_first(lambda: bring(directory))

        run = self.act(side, lambda: self.accelerator.load_state(str(directory)))
        return Contestant(f"load {kind} {side}", run, prepare=prepare)

    def memory(self, measured: Measured, side: str) -> None:
        """Save once and load once, for the extra memory, and check what was loaded."""
        directory = str(self.rank.scratch / f"kept {side}")
        for what, action in (
            ("save", self.act(side, lambda: self.accelerator.save_state(directory))),
            ("load", self.act(side, lambda: self.accelerator.load_state(directory))),
        ):
            with peak_memory() as peak:
                action(0)
            self.rank.barrier()
            measured.add(f"{what} memory {side}", self.rank.largest(peak.extra))
            if what == "save":
                wipe(self.model, self.optimizer)
        check(self.model, self.optimizer, side)


def _measure(rank: Rank, engine: str) -> Measured:
    job = _prepare(rank, engine)
    measured = Measured()
    for side in ("theirs", "ours"):
        job.memory(measured, side)
    measured.extend(interleave(rank, [job.saving("ours"), job.saving("theirs")]))
    for kind, bring in (("cold", make_cold), ("warm", make_warm)):
        sides = [job.loading(side, kind, bring) for side in ("ours", "theirs")]
        measured.extend(interleave(rank, sides, warm_up=0))
    rank.on_first(lambda: remove_and_settle(*rank.scratch.glob("kept *")))
    return measured


def _measure_beside(rank: Rank, engine: str) -> Measured:
    """Saves with equal promises, and beside the training. The accelerator stays attached, as in a job."""
    accelerator = _prepare(rank, engine).accelerator
    attach(accelerator, async_save=True, export=False)
    directory = rank.scratch / "beside"

    def until_staged(_turn: int) -> None:
        accelerator.save_state(str(directory))
        accelerator._zero_runtime.saved.staged()

    def until_committed(turn: int) -> None:
        until_staged(turn)
        accelerator.wait_for_saves()

    def theirs(_turn: int) -> None:
        Accelerator.save_state(accelerator, str(directory))

    def until_synced(turn: int) -> None:
        theirs(turn)
        rank.barrier()
        for file in files_under(directory)[rank.rank :: rank.world_size]:
            sync(file)
        rank.on_first(lambda: sync(directory))

    def clean(_turn: int) -> None:
        accelerator.wait_for_saves()
        rank.barrier()
        rank.on_first(lambda: remove_and_settle(directory))

    acts = {
        "ours": until_committed,
        "ours, async": until_staged,
        "theirs": theirs,
        "theirs, fsync": until_synced,
    }
    contestants = [Contestant(name, act, clean=clean) for name, act in acts.items()]
    return interleave(rank, contestants, warm_up=2)


def _prepare(rank: Rank, engine: str) -> _Job:
    accelerator = _accelerator(rank, engine)
    module = Model(rank.options.params)
    raw = torch.optim.AdamW(module.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(module, raw)
    bare = accelerator.unwrap_model(model)
    inner = optimizer.optimizer
    for parameter in bare.parameters():
        inner.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.empty_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.empty_like(parameter, requires_grad=False),
        }
    fill(bare, inner)
    return _Job(rank, accelerator, bare, inner)


def _accelerator(rank: Rank, engine: str) -> Accelerator:
    """On the ranks' process group, as under torchrun."""
    os.environ |= {
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_WORLD_SIZE": str(rank.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # never used: the group exists
    }
    accelerator = Accelerator(cpu=True)
    if engine == "FSDP2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
        )
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def _measure_steps(rank: Rank) -> Measured:
    accelerator = _accelerator(rank, "DDP")
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
    raw = torch.optim.AdamW(module.parameters())
    model, optimizer = accelerator.prepare(module, raw)
    batch = torch.randn(64, 256)

    def train(_turn: int) -> None:
        for _ in range(STEPS):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    def attached(_turn: int) -> None:
        attach(accelerator, export=False)

    def detached(_turn: int) -> None:
        detach(accelerator)

    return interleave(
        rank,
        [Contestant("plain", train), Contestant("attached", train, attached, detached)],
        warm_up=2,
        needs_memory=False,
    )
