"""Run Accelerate's own tests of its lifecycle with every `Accelerator` attached.

    python tests/peers/accelerate/run.py PATH [FILE ...] [-k EXPRESSION] [--stage 0..3]

PATH is a source tree of the installed Accelerate release; nothing of it is copied or changed. Every
file runs twice: as it is, and attached. Only tests that pass as they are count. The exit status is 1
when one of them fails attached and `KNOWN` has no reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

FILES = (
    "test_state_checkpointing.py",
    "test_accelerator.py",
    "test_data_loader.py",
    "test_optimizer.py",
    "test_scheduler.py",
    "test_grad_sync.py",
    "test_cpu.py",
    "test_kwargs_handlers.py",
    "test_hooks.py",
)
"""What exercises `prepare`, `save_state`, `load_state` and `end_training`, below `tests`."""

KNOWN: dict[str, str] = {}
"""Tests that pass with Accelerate alone and must differ attached, and why."""

Outcomes = dict[str, list[str]]


def run_file(arguments: argparse.Namespace, file: str, *, attached: bool) -> Outcomes:
    """Outcomes of one file's tests, by test id."""
    label = "attached" if attached else "alone"
    record = arguments.records / f"{file}.{label}.json"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"tests/{file}", "-v", "--color=no"]
    command += ["-p", "peer_plugin", "-p", "no:cacheprovider", f"--timeout={arguments.timeout}"]
    command += [f"--peer-record={record}", "--durations=5"]
    command += ["-k", arguments.k] if arguments.k else []
    with record.with_suffix(".log").open("w") as log:
        subprocess.run(
            command,
            cwd=arguments.source,
            env=environment(arguments, attached=attached),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    # Without a record pytest itself was killed: every test counts as one that did not run.
    return dict(json.loads(record.read_text())) if record.exists() else {}


def environment(arguments: argparse.Namespace, *, attached: bool) -> dict[str, str]:
    """On the CPU and off the network; what a test starts is attached too."""
    search = [str(HERE), str(HERE / "children"), *filter(None, [os.environ.get("PYTHONPATH")])]
    values = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PEER_STAGE": "" if arguments.stage is None else str(arguments.stage),
    }
    return {**values, "PEER_ATTACH": "1"} if attached else values


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="source tree of the installed Accelerate")
    parser.add_argument("files", nargs="*", default=FILES, help="below tests")
    parser.add_argument("-k", help="only tests that match, as in pytest")
    parser.add_argument("--stage", type=int, choices=range(4), help="of attach (default: None)")
    parser.add_argument("--timeout", type=float, default=200, help="seconds for one test")
    parser.add_argument("--records", type=Path, help="keep outcomes and logs in this folder")
    arguments = parser.parse_args()
    if not (arguments.source / "tests" / "test_accelerator.py").is_file():
        parser.error(f"{arguments.source}: expected an Accelerate source tree with its tests")
    arguments.source = arguments.source.resolve()
    arguments.records = Path(arguments.records or tempfile.mkdtemp()).resolve()
    arguments.records.mkdir(parents=True, exist_ok=True)
    return arguments


def main() -> int:
    arguments = parse()
    print(f"{'file':32} executed  passed  known  unexplained", flush=True)
    executed, unexplained = 0, []
    for file in arguments.files:
        alone = run_file(arguments, file, attached=False)
        ours = run_file(arguments, file, attached=True)
        counted = [test for test, (outcome, _) in alone.items() if outcome == "passed"]
        failed = [test for test in counted if ours.get(test, ["missing"])[0] != "passed"]
        new = [(test, ours.get(test, ["did not run"])) for test in failed if test not in KNOWN]
        executed, unexplained = executed + len(counted), unexplained + new
        passed, known = len(counted) - len(failed), len(failed) - len(new)
        print(f"{file:32} {len(counted):8} {passed:7} {known:6} {len(new):12}", flush=True)
        for test in failed:
            if test in KNOWN:
                print(f"    must differ: {test}: {KNOWN[test]}")
    for test, problem in unexplained:
        print(f"\nUNEXPLAINED {test}\n    {': '.join(problem)}")
    print(f"\nLogs: {arguments.records}")
    return 1 if unexplained or not executed else 0


if __name__ == "__main__":
    sys.exit(main())
