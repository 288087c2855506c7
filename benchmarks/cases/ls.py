"""`zero-ckpt ls` of very many checkpoints: start-up of the command, and the scan. Manifests are real, data is not.

The goal is what a user notices as a wait: one second, of which Python's own start is a part.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.measure import remove_and_settle
from benchmarks.ranks import Measured
from benchmarks.simulation import CHECKSUM, MODELS, fsdp, shard_names, table_of
from benchmarks.table import Row, at_most, timed_alone
from zero_ckpt.core.manifest import MANIFEST_NAME, FileRecord, Manifest
from zero_ckpt.core.planner import plan_save

GOAL = 1.0
RANKS = 8
LENGTH = 1 << 20


def ls(bench: Bench) -> list[Row]:
    tags = 20 if bench.options.smoke else 1000
    directory = bench.scratch / "checkpoints"
    _make(directory, tags)
    ways: dict[str, Callable[[], object]] = {
        "python": lambda: _run([sys.executable, "-c", "pass"]),
        "help": lambda: _command("--help"),
        "ls": lambda: _command("ls", str(directory)),
    }
    measured = Measured(labels={"python": "python -c pass"})
    for _ in range(bench.options.repeats):
        for name, act in ways.items():
            start = time.perf_counter()
            act()
            measured.add(name, time.perf_counter() - start)
    remove_and_settle(directory)
    return [
        timed_alone("ls", f"ls of {tags:,} tags of {RANKS} ranks", measured, "ls", at_most(GOAL)),
        timed_alone("ls", "start of the command", measured, "help"),
        timed_alone("ls", "start of Python", measured, "python"),
    ]


def _make(directory: Path, tags: int) -> None:
    """7B of parameters on 8 ranks in each tag; its files are holes."""
    plan = plan_save([(table_of(MODELS["7B"], fsdp(RANKS)), range(RANKS))])
    files = dict.fromkeys(shard_names(RANKS), FileRecord(LENGTH, CHECKSUM))
    for step in range(tags):
        folder = directory / f"global_step{step}"
        folder.mkdir(parents=True)
        for name in files:
            descriptor = os.open(folder / name, os.O_CREAT | os.O_WRONLY)
            os.ftruncate(descriptor, LENGTH)
            os.close(descriptor)
        manifest = Manifest(folder.name, step, RANKS, 3, 1, 1e9 + step, files, plan.roles)
        (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def _command(*arguments: str) -> None:
    _run([sys.executable, "-m", "zero_ckpt", *arguments])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
