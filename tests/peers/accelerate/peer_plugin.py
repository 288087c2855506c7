"""pytest plugin for a run of Accelerate's own tests, loaded with `-p peer_plugin`.

Owns: the record of what each test did (`--peer-record`), and, with `PEER_ATTACH` in the environment,
that every `Accelerator` is attached. The tests are run as they are: nothing in them is changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_WORST_LAST = ("passed", "skipped", "failed", "error")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peer-record", type=Path, required=True, help="JSON file for the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Record(config.getoption("--peer-record")))
    if os.environ.get("PEER_ATTACH"):  # a run of Accelerate alone imports nothing of ours
        from peer_attach import attach_all

        attach_all()


class _Record:
    """Test id -> [outcome, the error's message], written after every test: a run may be killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.removeprefix("tests/")
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        known = self._outcomes.get(name, ["passed"])
        if _WORST_LAST.index(outcome) >= _WORST_LAST.index(known[0]):
            crash = getattr(report.longrepr, "reprcrash", None)
            self._outcomes[name] = [outcome, getattr(crash, "message", "")[:500]]
        if report.when == "teardown":
            self._path.write_text(json.dumps(self._outcomes, indent=0))
