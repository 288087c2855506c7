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

from peer_standins import make_folder, missing

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

SCRIPTS = {
    "test_examples.py": "checkpointing or load_states",  # examples/by_feature/checkpointing.py
    "peer_scripts.py": "",  # test_utils/scripts/external_deps/test_checkpointing.py; ours to start it
}
"""What runs scripts that ask the hub, and the tests that count: run with `peer_standins`."""

KNOWN: dict[str, str] = {}
"""Tests that pass with Accelerate alone and must differ attached, and why."""

Outcomes = dict[str, list[str]]


def run_file(arguments: argparse.Namespace, file: str, *, attached: bool) -> Outcomes:
    """Outcomes of one file's tests, by test id."""
    label = "attached" if attached else "alone"
    record = arguments.records / f"{file}.{label}.json"
    record.unlink(missing_ok=True)
    path = file if (HERE / file).is_file() else f"tests/{file}"
    command = [sys.executable, "-m", "pytest", path, "-v", "--color=no"]
    command += ["-p", "peer_plugin", "-p", "no:cacheprovider", f"--timeout={arguments.timeout}"]
    command += [f"--peer-record={record}", "--durations=5"]
    chosen = [f"({words})" for words in (SCRIPTS.get(file), arguments.k) if words]
    command += ["-k", " and ".join(chosen)] if chosen else []
    with tempfile.TemporaryDirectory() as made, record.with_suffix(".log").open("w") as log:
        if file in SCRIPTS:
            make_folder(Path(made), arguments.source)
        subprocess.run(
            command,
            cwd=made if file in SCRIPTS else arguments.source,
            env=environment(arguments, file, made, attached=attached),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    # Without a record pytest itself was killed: every test counts as one that did not run.
    return dict(json.loads(record.read_text())) if record.exists() else {}


def environment(
    arguments: argparse.Namespace, file: str, cache: str, *, attached: bool
) -> dict[str, str]:
    """On the CPU and off the network; what a test starts is attached too."""
    search = [str(HERE), str(HERE / "children"), *filter(None, [os.environ.get("PYTHONPATH")])]
    search += [str(HERE / "standins")] if file in SCRIPTS else []
    values = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": cache,
        "OMP_NUM_THREADS": "1",
        "PEER_STAGE": "" if arguments.stage is None else str(arguments.stage),
    }
    return {**values, "PEER_ATTACH": "1"} if attached else values


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="source tree of the installed Accelerate")
    parser.add_argument("files", nargs="*", default=(*FILES, *SCRIPTS), help="below tests")
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
        if file in SCRIPTS and (why := missing(arguments.source)):
            print(f"{file:32} not run: {why}", flush=True)
            continue
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
