"""The cases of the suite by name, in the order in which they run.

A case takes a `Bench`, launches ranks as often as it needs, leaves its scratch folder empty, and
returns rows.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.cases.accelerate import accelerate
from benchmarks.cases.collapse import collapse
from benchmarks.cases.commit import commit
from benchmarks.cases.deepspeed import deepspeed
from benchmarks.cases.first import first
from benchmarks.cases.gpu import gpu
from benchmarks.cases.lightning import lightning
from benchmarks.cases.load import load
from benchmarks.cases.ls import ls
from benchmarks.cases.plan import plan
from benchmarks.cases.reshard import reshard
from benchmarks.cases.save import save
from benchmarks.cases.small import small
from benchmarks.cases.stall import stall
from benchmarks.cases.verify import verify
from benchmarks.table import Row

CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "save": save,
    "first": first,
    "load": load,
    "small": small,
    "reshard": reshard,
    "collapse": collapse,
    "accelerate": accelerate,
    "deepspeed": deepspeed,
    "lightning": lightning,
    "verify": verify,
    "stall": stall,
    "gpu": gpu,
    "plan": plan,
    "ls": ls,
    "commit": commit,
}
