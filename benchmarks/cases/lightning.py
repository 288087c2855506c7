"""Lightning's own sharded checkpoint (`ModelParallelStrategy`, through Fabric) beside ours, of the same model.

Lightning's save is not durable when it returns, and its load is not verified; ours are.

And for how long a `fit` stands still for a save: the call, and what the next step waits. One rank on one
core, so that a core is free, and steps that take longer than a copy of the state.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn

from benchmarks.bench import Bench
from benchmarks.job import Act, Job
from benchmarks.limits import TARGET_BYTES, copy_into
from benchmarks.measure import interleave, make_cold, make_warm, remove_and_settle, rounds
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_most, faster, slowdown
from benchmarks.workload import Model, build_large
from zero_ckpt.lightning import ZeroStrategy

RANKS = 2
TO_MEMCPY = 0.25
STEPS, EVERY = 8, 4  # saves after steps 1 and 5
COMPUTE = 1.0  # seconds of a step


def lightning(bench: Bench) -> list[Row]:
    measured = bench.launch(RANKS, _measure)
    measured.labels = dict.fromkeys(measured.samples, "Lightning, ModelParallelStrategy")
    rows = [
        faster("lightning", what, measured, f"{what} ours", f"{what} theirs")
        for what in ("save", "load cold", "load warm")
    ]
    fits = bench.launch(1, _measure_fits)
    what = "fit stands still for a save, async_save=True"
    rows.append(slowdown("lightning", what, fits, "async", "memcpy", at_most(TO_MEMCPY)))
    rows.append(faster("lightning", what, fits, "async", "sync"))
    return rows


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


def _measure_fits(rank: Rank) -> Measured:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = _Module(rank.options.params // 2, 0.02 if rank.options.smoke else COMPUTE)
    sources = [torch.rand_like(p.detach()) for p in module.parameters() for _ in range(3)]
    target = torch.zeros(TARGET_BYTES, dtype=torch.uint8)

    def play(_turn: int) -> dict[str, float]:
        fits = {name: _fit(rank, module, is_async=name == "async") for name in ("sync", "async")}
        return {**fits, "memcpy": rank.timed(lambda: copy_into(target, sources))}

    measured = rounds(rank, play)
    measured.labels = {"memcpy": "memcpy of the state", "sync": "without async_save"}
    return measured


class _Module(L.LightningModule):
    """Its steps compute for a stated time; gradients are there without a forward through the large model."""

    def __init__(self, params: int, seconds: float) -> None:
        super().__init__()
        self.model, self._seconds = Model(params), seconds

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        product, end = torch.rand(256, 256), time.perf_counter() + self._seconds
        while time.perf_counter() < end:
            product = (product @ product).clamp_(0, 1)
        return sum((p.sum() for p in self.parameters()), torch.zeros(()))

    def train_dataloader(self) -> Iterator[torch.Tensor]:
        return iter(torch.zeros(STEPS, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class _Saver(L.Callback):
    """Saves every few steps. `stood`: seconds for which training stood still for each save."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._calls: list[tuple[float, Any]] = []

    @property
    def stood(self) -> list[float]:
        return [seconds + flight.timings["fence"] for seconds, flight in self._calls]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % EVERY == 1:
            start = time.perf_counter()
            trainer.save_checkpoint(self._directory / f"{trainer.global_step}.ckpt")
            seconds = time.perf_counter() - start
            flights = getattr(trainer.strategy.engine, "_flights", None)
            self._calls.append((seconds, flights[-1] if flights else _Done()))


class _Done:
    """A save that was committed when it returned."""

    timings: ClassVar[dict[str, float]] = {"fence": 0.0}


def _fit(rank: Rank, module: L.LightningModule, *, is_async: bool) -> float:
    directory = rank.scratch / "fit"
    saver = _Saver(directory)
    trainer = L.Trainer(
        strategy=ZeroStrategy(stage=0, async_save=is_async, export=False),
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        callbacks=[saver],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module)
    remove_and_settle(directory)
    return median(saver.stood)


def _as_it_is(model: nn.Module, device_mesh: object) -> nn.Module:
    return model
