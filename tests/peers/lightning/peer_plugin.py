"""pytest plugin for a run of Lightning's own tests, loaded with `-p peer_plugin`.

Owns: the record of what each test did (`--peer-record`), and, with `--peer-stage`, `ZeroStrategy`
in the place of what Lightning would choose on a CPU: of `SingleDeviceStrategy` when a test names
none, and of DDP under each of its names. A strategy that a test makes itself stays. Lightning's
tests are run as they are: nothing in them is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

_WORST_LAST = ("passed", "skipped", "failed", "error")
_START_METHODS = {"spawn": "spawn", "fork": "fork", "notebook": "fork"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peer")
    group.addoption("--peer-record", type=Path, required=True, help="JSON file for the outcomes")
    group.addoption("--peer-stage", type=int, help="train with ZeroStrategy of this stage")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Record(config.getoption("--peer-record")))
    stage = config.getoption("--peer-stage")
    if stage is not None:  # a run with Lightning's own strategies imports nothing of ours
        from peer_folders import show_folders_as_files
        from peer_tensors import compare_whole_tensors

        from zero_ckpt.lightning import make_strategy

        _replace_default(make_strategy("lightning.pytorch"), stage)
        show_folders_as_files()
        compare_whole_tensors()


class _Record:
    """Test id -> [outcome, the error's message], written after every test: a run may be killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.removeprefix("tests/tests_pytorch/")
        if report.outcome == "rerun":  # a test marked as flaky failed, and starts again
            self._outcomes.pop(name, None)
            return
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        known = self._outcomes.get(name, ["passed"])
        if _WORST_LAST.index(outcome) >= _WORST_LAST.index(known[0]):
            crash = getattr(report.longrepr, "reprcrash", None)
            self._outcomes[name] = [outcome, getattr(crash, "message", "")[:500]]
        if report.when == "teardown":
            self._path.write_text(json.dumps(self._outcomes, indent=0))


def _replace_default(strategy: type[Any], stage: int) -> None:
    choose: Callable[..., Any] = _AcceleratorConnector._choose_strategy
    init: Callable[..., None] = _AcceleratorConnector._init_strategy

    def choose_zero(self: _AcceleratorConnector) -> Any:
        chosen = choose(self)
        on_cpu = isinstance(chosen, SingleDeviceStrategy) and chosen.root_device.type == "cpu"
        return "ddp" if on_cpu else chosen

    def init_zero(self: _AcceleratorConnector) -> None:
        flag = self._strategy_flag
        on_cpu = self._accelerator_flag == "cpu"
        if on_cpu and isinstance(flag, str) and flag.startswith("ddp"):
            kind = flag.removeprefix("ddp").removeprefix("_").partition("_")[0]
            self.strategy = strategy(stage=stage, start_method=_START_METHODS.get(kind, "popen"))
        else:
            init(self)

    # Each test waits for this thread, which looks for dead processes every 5 seconds.
    _ChildProcessObserver.__init__.__defaults__ = (0.05,)
    _AcceleratorConnector._choose_strategy = choose_zero
    _AcceleratorConnector._init_strategy = init_zero
