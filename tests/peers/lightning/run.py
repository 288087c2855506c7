"""Run the tests of Lightning that exercise save and resume with `ZeroStrategy` as the default.

    python tests/peers/lightning/run.py PATH [FILE ...] [-k EXPRESSION] [--stage 0..3]

PATH is a source tree of the installed Lightning release; nothing of it is copied or changed. Every
file runs twice: as it is, and with `ZeroStrategy`. Only tests that pass as they are count. The exit
status is 1 when one of them fails with `ZeroStrategy` and `known_differences.py` has no reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from known_differences import KNOWN, difference_of

HERE = Path(__file__).resolve().parent

FILES = (
    "checkpointing/test_model_checkpoint.py",
    "checkpointing/test_checkpoint_callback_frequency.py",
    "checkpointing/test_trainer_checkpoint.py",
    "checkpointing/test_torch_saving.py",
    "models/test_restore.py",
    "models/test_hooks.py",
    "loops/test_loops.py",
    "loops/test_training_epoch_loop.py",
    "loops/test_progress.py",
    "loops/test_loop_state_dict.py",
    "loops/optimization",
    "trainer/connectors",
    "trainer/dynamic_args",
    "trainer/flags",
    "trainer/logging_",
    "trainer/properties",
    "trainer/test_config_validator.py",
    "trainer/test_dataloaders.py",
    "trainer/test_states.py",
    "trainer/optimization",
    "trainer/test_trainer.py",
    "core/test_lightning_optimizer.py",
    "core/test_datamodules.py",
    "callbacks/test_model_checkpoint_additional_cases.py",
    "callbacks/test_model_checkpoint_edge_cases.py",
    "callbacks/test_model_checkpoint_manual_opt.py",
    "callbacks/test_model_checkpoint_step_interval_val_metric.py",
    "callbacks/test_weight_averaging.py",
    "callbacks/test_stochastic_weight_avg.py",
    "callbacks/test_finetuning_callback.py",
    "callbacks/test_early_stopping.py",
    "callbacks/test_timer.py",
    "callbacks/test_gradient_accumulation_scheduler.py",
    "callbacks/test_callbacks.py",
    "callbacks/test_callback_hook_outputs.py",
    "callbacks/test_device_stats_monitor.py",
    "callbacks/test_lambda_function.py",
    "callbacks/test_lr_monitor.py",
    "callbacks/test_model_summary.py",
    "callbacks/test_prediction_writer.py",
    "callbacks/test_pruning.py",
    "callbacks/test_rich_model_summary.py",
    "callbacks/test_spike.py",
    "callbacks/test_throughput_monitor.py",
    "callbacks/progress",
    "plugins/test_checkpoint_io_plugin.py",
    "plugins/test_async_checkpoint.py",
    "tuner/test_lr_finder.py",
)
"""What exercises save and resume, below `tests/tests_pytorch` of the source tree."""

Outcomes = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of the tests of one file that pass with Lightning's own strategies."""

    executed: int
    passed: int
    known: tuple[str, ...]
    unexplained: tuple[tuple[str, str], ...]
    outdated: tuple[str, ...]


def judge(own: Outcomes, zero: Outcomes) -> Judgement:
    """Compare two runs of the same tests: under Lightning's own strategies, and under ours."""
    counted = [test for test, (outcome, _) in own.items() if outcome == "passed"]
    failed = {test for test in counted if zero.get(test, ["missing"])[0] != "passed"}
    known = tuple(test for test in counted if test in failed and difference_of(test))
    unexplained = tuple(
        (test, ": ".join(zero.get(test, ["did not run"])))
        for test in counted
        if test in failed and test not in known
    )
    exact = {test for each in KNOWN for test in each.tests}
    outdated = tuple(test for test in counted if test not in failed and test in exact)
    return Judgement(len(counted), len(counted) - len(failed), known, unexplained, outdated)


def run_file(arguments: argparse.Namespace, file: str, stage: int | None) -> Outcomes:
    """Outcomes of one file's tests; None for `stage`: with Lightning's own strategies."""
    label = "own" if stage is None else f"stage{stage}"
    record = arguments.records / f"{file.replace('/', '.')}.{label}.json"
    if stage is None and record.exists() and arguments.reuse:
        return dict(json.loads(record.read_text()))
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"tests/tests_pytorch/{file}", "-v", "--color=no"]
    command += ["-p", "peer_plugin", "-p", "no:cacheprovider", f"--timeout={arguments.timeout}"]
    command += [f"--peer-record={record}", "--durations=10"]
    command += [] if stage is None else [f"--peer-stage={stage}"]
    command += ["-k", arguments.k] if arguments.k else []
    search = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1"}
    with record.with_suffix(".log").open("w") as log:
        subprocess.run(
            command,
            cwd=arguments.source,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not record.exists():
        return {}  # pytest itself was killed: every test counts as one that did not run
    return dict(json.loads(record.read_text()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="source tree of the installed Lightning")
    parser.add_argument("files", nargs="*", default=FILES, help="below tests/tests_pytorch")
    parser.add_argument("-k", help="only tests that match, as in pytest")
    parser.add_argument("--stage", type=int, default=2, choices=range(4))
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one test")
    parser.add_argument("--records", type=Path, help="keep outcomes and logs in this folder")
    parser.add_argument("--reuse", action="store_true", help="take Lightning's own from there")
    arguments = parser.parse_args()
    if not (arguments.source / "tests" / "tests_pytorch").is_dir():
        parser.error(
            f"{arguments.source}: expected a Lightning source tree with tests/tests_pytorch"
        )
    arguments.source = arguments.source.resolve()
    arguments.records = Path(arguments.records or tempfile.mkdtemp()).resolve()
    arguments.records.mkdir(parents=True, exist_ok=True)
    return arguments


def main() -> int:
    arguments = parse()
    print(f"{'file':58} executed  passed  known  unexplained", flush=True)
    judgements = []
    for file in arguments.files:
        found = judge(run_file(arguments, file, None), run_file(arguments, file, arguments.stage))
        judgements.append(found)
        known, unexplained = len(found.known), len(found.unexplained)
        print(
            f"{file:58} {found.executed:8} {found.passed:7} {known:6} {unexplained:12}", flush=True
        )
    totals = [sum(each.executed for each in judgements), sum(each.passed for each in judgements)]
    totals += [sum(len(each.known) for each in judgements)]
    totals += [sum(len(each.unexplained) for each in judgements)]
    print("{:58} {:8} {:7} {:6} {:12}".format("all", *totals))
    report_details(judgements)
    print(f"\nLogs: {arguments.records}")
    return 1 if totals[-1] or not totals[0] else 0


def report_details(judgements: list[Judgement]) -> None:
    seen = {test for each in judgements for test in each.known}
    for difference in KNOWN:
        tests = [test for test in seen if difference_of(test) is difference]
        if tests:
            print(f"\nMust differ ({len(tests)}): {difference.reason}")
    for test in (test for each in judgements for test in each.outdated):
        print(f"\nPasses, but is listed as a known difference: {test}")
    for test, problem in (pair for each in judgements for pair in each.unexplained):
        print(f"\nUNEXPLAINED {test}\n    {problem}")


if __name__ == "__main__":
    sys.exit(main())
