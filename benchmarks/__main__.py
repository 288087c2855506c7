"""`python -m benchmarks`: runs the cases, prints one table, writes all samples as JSON."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import zero_ckpt
from benchmarks.bench import Bench
from benchmarks.cases import CASES
from benchmarks.options import Options, read_options
from benchmarks.table import Row, as_json, render

BYTES_PER_PARAM = 12  # fp32 weights and two fp32 moments
CHECKPOINTS_AT_ONCE = 6  # reshard keeps six: ours, DCP's and raw files, each for 2 and 4 ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when a judged goal was missed."""
    options = read_options(arguments, list(CASES))
    _check_space(options)
    rows = []
    for name in options.only or CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += _run(name, options)
    print(render(rows, smoke=options.smoke))
    print(f"\nsamples: {_write(rows, options)}")
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
    free = shutil.disk_usage(options.scratch).free
    if free < needed:
        sys.exit(
            f"{options.scratch}: {needed / 1e9:.0f} GB needed for --params {options.params}, "
            f"{free / 1e9:.0f} GB free. Give --scratch another folder, or fewer --params."
        )


def _write(rows: Sequence[Row], options: Options) -> Path:
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    given = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()}
    result = {
        "machine": _machine(),
        "options": given,
        "rows": as_json(rows, smoke=options.smoke),
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file


def _machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zero_ckpt": zero_ckpt.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
