"""The benchmark suite runs, and says what it found in every form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import joined, machine_text
from benchmarks.table import Row, as_json, at_least, at_most

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_small_cases_run_and_leave_their_samples(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--small", "--repeats", "1"]
    where = ["--scratch", str(tmp_path), "--results", str(tmp_path / "results")]
    done = subprocess.run(
        [*command, *where, "--only", "plan,commit,ls"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text())
    assert {row["case"] for row in result["rows"]} == {"plan", "commit", "ls"}
    assert all(row["zero_ckpt"] and row["measured"] in done.stdout for row in result["rows"])
    assert result["machine"]["versions"]["torch"]
    rows = list(joined([result, result]))
    assert json.loads(json.dumps(as_json(rows, smoke=True))) == result["rows"]
    assert machine_text(result["machine"]).startswith(result["machine"]["date"])
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "scratch folders are gone"


def test_a_goal_is_met_or_missed() -> None:
    met = Row("save", "save", (1.0,), "raw", (0.9,), "s", 0.9, at_least(0.9))
    missed = Row("plan", "plan", (2.0,), "", (), "s", 2.0, at_most(1))
    assert (met.verdict(False), met.judged_text, met.goal_text) == ("ok", "0.9", ">= 0.9")
    assert (missed.verdict(False), missed.judged_text, missed.goal_text) == (
        "MISSED",
        "2 s",
        "<= 1 s",
    )
    assert missed.verdict(True) == "not judged"
