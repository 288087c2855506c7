"""What one run of the suite is asked to do: sizes, repeats and places, read from the command line.

Owns the defaults. Pure: reads nothing but the arguments given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Options:
    """One run's sizes and places. It is sent to every rank, so it must pickle."""

    params: int  # parameters of the large model (fp32, with Adam state: 12 bytes each on disk)
    gpu_params: int  # parameters of the model that the case `gpu` trains
    small_tensors: int  # number of tensors per rank in the case of many small tensors
    repeats: int  # timed rounds; one more, untimed in the result, warms everything up
    smoke: bool  # sizes too small to judge: goals are shown, not judged
    scratch: Path  # parent of the scratch folder; its file system is what gets measured
    results: Path  # folder of the JSON files
    only: tuple[str, ...]  # names of cases; empty: all


def read_options(arguments: Sequence[str] | None, case_names: Sequence[str]) -> Options:
    """Parses the command line; exits with a usage message when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures zero_ckpt beside torch.distributed.checkpoint, torch.save and the "
        "limits of this machine's disk. Exits with 1 when a goal is missed.",
    )
    parser.add_argument("--params", type=_count, help="parameters of the model (250M)")
    parser.add_argument("--gpu-params", type=_count, help="parameters trained in `gpu` (1G)")
    parser.add_argument("--small-tensors", type=_count, help="small tensors per rank (20k)")
    parser.add_argument("--repeats", type=_count, help="timed rounds of every case (5)")
    parser.add_argument(
        "--small", action="store_true", help="smoke run: tiny sizes, goals unjudged"
    )
    parser.add_argument(
        "--only", action="extend", type=_cases(case_names), help="cases, with commas; repeatable"
    )
    parser.add_argument("--scratch", type=Path, default=HERE, help="folder on the disk to measure")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(arguments)
    params, gpu_params, small_tensors, repeats = (
        (2_000_000, 500_000, 200, 2) if given.small else (250_000_000, 10**9, 20_000, 5)
    )
    return Options(
        params=given.params or params,
        gpu_params=given.gpu_params or gpu_params,
        small_tensors=given.small_tensors or small_tensors,
        repeats=given.repeats or repeats,
        smoke=given.small,
        scratch=given.scratch.resolve(),
        results=given.results.resolve(),
        only=tuple(given.only or ()),
    )


def _cases(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads `plan,commit`."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(
                f"cases of {', '.join(known)} expected, {', '.join(sorted(unknown))} found"
            )
        return names

    return read


def _count(text: str) -> int:
    """`250M`, `20k`, `1.5G` or a plain number; at least 1."""
    scale = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower(), 1)
    try:
        count = int(float(text[:-1] if scale > 1 else text) * scale)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"a positive number such as 250M expected, {text!r} found")
    return count
