"""DeepSpeed itself on the same ranks: its saves and loads against ours, and the fp32 collapse of its files.

The same 250M parameters in fp32 with Adam state, on CPU with gloo. DeepSpeed's engine trains one step, so that it has
optimizer state; ours is filled. DeepSpeed's save is not durable, so it is measured as it is and with an fsync of what
it wrote. Needs the dependency group `deepspeed`; without it the case is skipped.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import zero_ckpt
from benchmarks.bench import Bench
from benchmarks.job import Act, Job
from benchmarks.measure import (
    Contestant,
    files_under,
    interleave,
    make_cold,
    make_warm,
    peak_memory,
    remove_and_settle,
    rotated,
    sync,
)
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_least, bounded, faster
from benchmarks.workload import Model, build_large

RANKS = 2
SAVE_GOALS = {2: 1.5, 3: 1.3}
LOAD_GOAL = 1.5
MEMORY_GOAL = 300  # MB above import
TOKENS = 8
TAG = "t"

Collapse = Callable[[Path, Path], object]


def deepspeed(bench: Bench) -> list[Row]:
    if find_spec("deepspeed") is None:
        print("  skipped: DeepSpeed is not installed (see benchmarks/README.md)", file=sys.stderr)
        return []
    rows: list[Row] = []
    for stage in SAVE_GOALS:
        rows += _save_and_load_rows(bench.launch(RANKS, _measure, stage), stage)
        rows += _collapse_rows(_collapse(bench), stage)
        remove_and_settle(bench.scratch / "theirs", bench.scratch / "ours")
    return rows


def _save_and_load_rows(measured: Measured, stage: int) -> list[Row]:
    measured.labels = dict.fromkeys(measured.samples, "DeepSpeed")
    measured.labels |= {"save synced": "DeepSpeed + fsync", "save theirs": "DeepSpeed, not durable"}

    def row(what: str, ours: str, theirs: str, goal: float | None) -> Row:
        text = f"{what}, stage {stage}"
        return faster("deepspeed", text, measured, ours, theirs, at_least(goal) if goal else None)

    rows = [
        row("save", "save ours", "save synced", SAVE_GOALS[stage]),
        row("save", "save ours", "save theirs", None),
    ]
    for kind in ("cold", "warm"):
        for way, name in (("new job", "new"), ("in place", "ours"), ("verify_first=False", "once")):
            names = f"{kind} {name}", f"{kind} theirs"
            rows.append(row(f"load {kind}, {way}", *names, LOAD_GOAL))
    return rows


def _collapse_rows(measured: Measured, stage: int) -> list[Row]:
    theirs = [name for name in THEIRS if name in measured.samples]
    fastest = min(theirs, key=lambda name: median(measured.samples[name]))
    measured.labels = {name: f"DeepSpeed, {name.removeprefix('theirs ')}" for name in theirs}
    measured.labels |= {f"{name} memory": label for name, label in measured.labels.items()}
    what = f"collapse of DeepSpeed's stage {stage} files"

    def row(form: str, theirs: str, goal: float) -> Row:
        return faster(
            "deepspeed", f"{what}, {form}", measured, f"ours {form}", theirs, at_least(goal)
        )

    memory = f"memory of that, stage {stage}"
    names = "ours .bin memory", f"{fastest} memory"
    return [
        row("safetensors", fastest, 2),
        row("safetensors", "theirs safetensors", 4),
        row(".bin", fastest, 2),
        bounded("deepspeed", memory, measured, *names, MEMORY_GOAL),
    ]


# ---- saves and loads, on ranks


class _Trained(Model):
    """The model of the other cases with a forward pass: each of its layers has a part in the loss."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            mixed = block.out(block.qkv(block.norm1(x)).chunk(3, -1)[0])
            x = x + mixed + block.down(block.up(block.norm2(x)))
        loss: torch.Tensor = self.norm(x).square().mean()
        return loss


def _measure(rank: Rank, stage: int) -> Measured:
    engine = _engine(rank, stage)
    job = Job(rank, build_large)
    measured = interleave(rank, [job.saving("save ours", job.ours.save), *_savings(rank, engine)])
    kept = {"ours": rank.scratch / "ours", "theirs": rank.scratch / "theirs"}
    _save(engine, kept["theirs"])
    job.ours.save(kept["ours"])
    job.checked_load("ours", kept["ours"], job.ours.load)
    for kind, bring in (("cold", make_cold), ("warm", make_warm)):
        contestants = [
            job.resuming(f"{kind} new", kept["ours"], job.ours.load, bring),
            job.loading(f"{kind} ours", kept["ours"], job.ours.load, bring),
            job.loading(f"{kind} once", kept["ours"], job.ours.load_once, bring),
            _loading(rank, f"{kind} theirs", engine, kept["theirs"], bring),
        ]
        measured.extend(interleave(rank, contestants, warm_up=0))
    return measured


def _engine(rank: Rank, stage: int) -> Any:
    """DeepSpeed's engine at a ZeRO stage after one step, on the process group that the ranks have."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_SIZE": str(rank.world_size),
    }
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model: nn.Module = _Trained(rank.options.params)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.arange(TOKENS)[None]))
    engine.step()
    return engine


def _save(engine: Any, directory: Path) -> None:
    engine.save_checkpoint(str(directory), tag=TAG)


def _savings(rank: Rank, engine: Any) -> list[Contestant]:
    """As it is, and made durable: each rank syncs a part of the files."""

    def synced(directory: Path) -> None:
        _save(engine, directory)
        for file in [*files_under(directory), directory / TAG, directory][rank.rank :: RANKS]:
            sync(file)

    found = []
    for name, save in (("save theirs", lambda path: _save(engine, path)), ("save synced", synced)):
        directory = rank.scratch / name

        def clean(_turn: int, directory: Path = directory) -> None:
            rank.on_first(lambda: remove_and_settle(directory))

        def run(_turn: int, save: Act = save, directory: Path = directory) -> None:
            save(directory)

        found.append(Contestant(name, run, clean=clean))
    return found


def _loading(
    rank: Rank, name: str, engine: Any, directory: Path, bring: Callable[[Path], None]
) -> Contestant:
    def prepare(_turn: int) -> None:
        rank.on_first(lambda: bring(directory))

    return Contestant(
        name, lambda _turn: engine.load_checkpoint(str(directory), tag=TAG), prepare=prepare
    )


# ---- the collapse, in one process


def _ours(source: Path, output: Path) -> None:
    zero_ckpt.export_fp32(source, output, TAG)


def _theirs(source: Path, output: Path, safe: bool, limit: str | None) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(
        str(source), str(output), max_shard_size=limit, safe_serialization=safe, tag=TAG
    )


OURS: dict[str, Collapse] = {
    "ours safetensors": lambda source, out: _ours(source, out / "model.safetensors"),
    "ours .bin": lambda source, out: _ours(source, out / "pytorch_model.bin"),
}
THEIRS: dict[str, Collapse] = {
    "theirs .bin": lambda source, out: _theirs(source, out, False, None),
    "theirs .bin, 5GB": lambda source, out: _theirs(source, out, False, "5GB"),
    "theirs safetensors": lambda source, out: _theirs(source, out, True, "5GB"),
}


def _collapse(bench: Bench) -> Measured:
    source, output = bench.scratch / "theirs", bench.scratch / "collapsed"
    make_warm(source)
    measured = Measured()
    for turn in range(bench.options.repeats):
        for name in rotated([*OURS, *THEIRS], turn):
            seconds, extra = _in_new_process(name, source, output)
            measured.add(name, seconds)
            measured.add(f"{name} memory", extra)
            print(f"  round {turn}: {name} {seconds:.3f} s", file=sys.stderr, flush=True)
            remove_and_settle(output)
    return measured


def _in_new_process(name: str, source: Path, output: Path) -> tuple[float, int]:
    """Imports come before the clock and the memory's baseline."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_import) as pool:
        return pool.submit(_run, name, source, output).result()


def _import() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.utils.zero_to_fp32  # noqa: F401
    import huggingface_hub  # noqa: F401 - their conversion imports it late

    import zero_ckpt.fp32
    import zero_ckpt.interop.deepspeed.content  # noqa: F401 - it is imported when a folder is met that is not ours


def _run(name: str, source: Path, output: Path) -> tuple[float, int]:
    act = (OURS | THEIRS)[name]
    output.mkdir()
    sink = io.StringIO()  # for their progress bars
    with redirect_stdout(sink), redirect_stderr(sink), peak_memory() as peak:
        start = time.perf_counter()
        act(source, output)
        seconds = time.perf_counter() - start
    return seconds, peak.extra
