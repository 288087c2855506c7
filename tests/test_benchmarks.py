"""The benchmark suite runs, and says what it found in every form."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.__main__ import main
from benchmarks.bench import Bench
from benchmarks.cases import CASES, stall
from benchmarks.cases.gpu import gpu
from benchmarks.options import read_options
from benchmarks.plot import MET, MISSED, MUTED, can_plot, color_of, plot
from benchmarks.ranks import Measured
from benchmarks.report import joined, machine_text, markdown
from benchmarks.scale import FOLLOWER_CALLS, RANK_0_CALLS
from benchmarks.scale import main as print_scale
from benchmarks.table import Row, as_json, at_least, at_most
from zero_ckpt.core.store_control import StoreControl

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


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Of the smallest run."""
    return Bench(read_options(["--small", "--repeats", "1"], []), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_gpu_case_does_on_a_cpu_what_it_would_on_a_device(bench: Bench) -> None:
    rows = gpu(bench, device="cpu")
    assert [(row.what.split(",")[0], row.goal_text) for row in rows] == [
        ("async save", "<= 0.05"),
        ("step of 0.00023B parameters in fp32", ""),
        ("staging", ""),
        ("first save", "<= 1.2"),
        ("stall of the first async save", ""),
    ]
    assert all(len(row.ours) == len(row.theirs) == 1 for row in rows)
    assert all(0 < seconds < 60 for row in rows for seconds in (*row.ours, *row.theirs))
    assert {path.name for path in bench.scratch.iterdir()} == {"measured.json"}


def test_the_gpu_case_is_skipped_in_one_line_without_a_device(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu(bench) == []
    assert capsys.readouterr().err == "  skipped: no CUDA device here\n"


@pytest.mark.parametrize(("options", "seconds"), [(["--small"], "0.05 s"), ([], "2 s")])
def test_rows_on_computing_name_the_seconds_that_were_computed(
    options: list[str], seconds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["ours", "ours step", "raw step", "step", "memcpy"]
    names += [f"dcp {kind}{what}" for kind in ("thread", "process") for what in ("", " step")]
    measured = Measured({name: [1.0] for name in names}, {"size": "1 GB"})
    monkeypatch.setattr(Bench, "launch", lambda *_: measured)
    told = [row.what for row in stall(Bench(read_options(options, []), tmp_path))]
    steps = [what for what in told if "of computing" in what]
    assert len(steps) == 7
    assert all(what.startswith(f"{seconds} of computing") for what in steps)


def test_what_is_not_judged_is_drawn_and_reported_as_neither_met_nor_missed(tmp_path: Path) -> None:
    met = Row("save", "save", (1.0,), "raw", (0.9,), "s", 0.9, at_least(0.9))
    missed = Row("save", "load", (1.0,), "raw", (0.1,), "s", 0.1, at_least(0.9))
    assert [color_of(row, smoke=False) for row in (met, missed)] == [MET, MISSED]
    assert [color_of(row, smoke=True) for row in (met, missed)] == [MUTED, MUTED]
    assert "missed" in markdown([missed], smoke=False)
    assert "| not judged |" in markdown([missed], smoke=True)
    if can_plot():
        plot([met, missed], tmp_path / "a.png", "", smoke=True)
        assert (tmp_path / "a.png").stat().st_size > 1000


def test_an_interrupted_run_leaves_the_results_of_the_cases_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Bench) -> list[Row]:
        raise KeyboardInterrupt

    row = Row("save", "save", (1.0,), "raw", (0.9,), "s", 0.9, at_least(0.9))
    monkeypatch.setitem(CASES, "save", lambda _: [row])
    monkeypatch.setitem(CASES, "first", interrupt)
    where = ["--scratch", str(tmp_path), "--results", str(tmp_path / "results")]
    with pytest.raises(KeyboardInterrupt):
        main(["--small", "--only", "save,first", *where])
    (file,) = (tmp_path / "results").iterdir()
    (kept,) = json.loads(file.read_text())["rows"]
    assert (kept["case"], kept["judged"]) == ("save", 0.9)


class CountingStore:
    """A store that counts one rank's calls, but for looks whether something is there yet."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self.calls = store, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += name != "check"
        return getattr(self._store, name)


def test_a_meeting_makes_as_many_calls_to_the_store_as_the_tables_count() -> None:
    ranks, shared = 4, dist.HashStore()
    stores = [CountingStore(shared) for _ in range(ranks)]
    controls = [StoreControl(store, rank, ranks) for rank, store in enumerate(stores)]
    for store in stores:
        store.calls.clear()
    threads = [
        threading.Thread(target=control.meet, args=("save: vote", b"", lambda _: b"", 30))
        for control in controls
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert stores[0].calls.total() == RANK_0_CALLS * (ranks - 1)
    assert [store.calls.total() for store in stores[1:]] == [FOLLOWER_CALLS] * (ranks - 1)


def test_the_tables_of_the_page_are_those_that_are_computed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_scale()
    page = (ROOT / "docs" / "scale.md").read_text()
    _, _, rest = page.partition("<!-- python -m benchmarks.scale -->\n")
    assert rest.startswith(capsys.readouterr().out)
