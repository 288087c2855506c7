"""`python -m benchmarks`: runs the cases, prints one table, writes all samples as JSON."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.cases import CASES
from benchmarks.options import Options, read_options
from benchmarks.plot import can_plot, plot
from benchmarks.report import machine_text
from benchmarks.table import Row, as_json, render

BYTES_PER_PARAM = 12  # fp32 weights and two fp32 moments
CHECKPOINTS_AT_ONCE = 6  # reshard keeps six: ours, DCP's and raw files, each for 2 and 4 ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when a judged goal was missed."""
    options = read_options(arguments, list(CASES))
    _check_space(options)
    file = options.results / f"{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    rows: list[Row] = []
    for name in options.only or CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += _run(name, options)
        _write(rows, options, file)  # what an interruption leaves
    print(render(rows, smoke=options.smoke))
    print(f"\nsamples: {file}")
    if can_plot():
        picture = file.with_suffix(".png")
        plot(rows, picture, machine_text(_machine(options.scratch)), smoke=options.smoke)
        print(f"picture: {picture}")
    return int(any(row.verdict(options.smoke) == "MISSED" for row in rows))


def _run(name: str, options: Options) -> list[Row]:
    """One case in a scratch folder that is gone afterwards, however the case ends."""
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=options.scratch))
    try:
        return CASES[name](Bench(options, scratch))
    finally:
        shutil.rmtree(scratch)
        os.sync()


def _check_space(options: Options) -> None:
    needed = options.params * BYTES_PER_PARAM * CHECKPOINTS_AT_ONCE
    if torch.cuda.is_available() and "gpu" in (options.only or CASES):
        needed = max(needed, options.gpu_params * BYTES_PER_PARAM)
    free = shutil.disk_usage(options.scratch).free
    if free < needed:
        sys.exit(
            f"{options.scratch}: {needed / 1e9:.0f} GB needed for --params {options.params} and --gpu-params "
            f"{options.gpu_params}, {free / 1e9:.0f} GB free. Give --scratch another folder, or fewer parameters."
        )


def _write(rows: Sequence[Row], options: Options, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    given = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()}
    result = {
        "machine": _machine(options.scratch),
        "options": given,
        "rows": as_json(rows, smoke=options.smoke),
    }
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(file)


def _machine(scratch: Path) -> dict[str, Any]:
    packages = ("torch", "zero-ckpt", "lightning", "accelerate", "safetensors")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk": _disk_kind(scratch),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "CPU")


def _disk_kind(directory: Path) -> str:
    """The file system, and whether its device turns: `ext4 on a solid-state disk`."""
    found = subprocess.run(
        ["findmnt", "-no", "FSTYPE", "-T", os.fspath(directory)], capture_output=True, text=True
    )
    number = directory.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    queue = next((p for p in (device / "queue", device / "../queue") if p.is_dir()), None)
    turns = queue is not None and (queue / "rotational").read_text().strip() == "1"
    kind = "a disk" if queue is None else "a turning disk" if turns else "a solid-state disk"
    return f"{found.stdout.strip() or 'file system'} on {kind}"


if __name__ == "__main__":
    sys.exit(main())
