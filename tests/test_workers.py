"""The harness itself: what it returns, what it reports, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.workers import RankFailed, kill_forgotten, run_ranks, start_ranks

calls: list[None] = []


def all_reduce(offset: int) -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise LookupError("nothing here")
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def die_on(rank: int, number: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), number)
    with contextlib.suppress(RuntimeError):
        dist.barrier()


def report_surroundings() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "threads": torch.get_num_threads(),
        "interrupt": signal.getsignal(signal.SIGINT),
        "environ": {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "FROM_TEST")},
    }


def server_threads() -> int:
    return len(os.listdir(f"/proc/{os.getppid()}/task"))


def count_calls() -> int:
    calls.append(None)
    return len(calls)


def return_lambda() -> object:
    return lambda: None


def identity(value: torch.Tensor) -> torch.Tensor:
    return value


def print_rank() -> None:
    print(f"hello from {dist.get_rank()}")


def warn(category: type[Warning]) -> None:
    warnings.warn("old", category, stacklevel=1)


def warn_elsewhere() -> None:
    warnings.warn_explicit("old", FutureWarning, "torch/x.py", 1, module="torch.x")


def use_lost_store(directory: str) -> str:
    Path(directory, f"ready{dist.get_rank()}").touch()
    while not Path(directory, "stopped").exists():
        time.sleep(0.01)
    try:
        dist.distributed_c10d._get_default_store().add("key", 1)
    except dist.DistError as error:
        return type(error).__name__
    return "the store still answers"


def keep_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(600,)).start()


def test_values_come_back_by_rank() -> None:
    assert run_ranks(all_reduce, 2, 10) == [(0, 2, 21.0), (1, 2, 21.0)]
    assert run_ranks(all_reduce, 3, 0) == [(0, 3, 3.0), (1, 3, 3.0), (2, 3, 3.0)]


def test_tensors_travel_both_ways() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    assert all(torch.equal(tensor, result) for result in run_ranks(identity, 2, tensor))


def test_exception_names_its_rank_and_shows_the_traceback() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 raised builtins\.LookupError") as caught:
        run_ranks(fail_on, 2, 1)
    assert caught.value.rank == 1
    assert caught.value.outcomes[1].error.endswith("LookupError: nothing here\n")
    assert "in fail_on" in str(caught.value)


def test_hang_is_killed_with_its_stack() -> None:
    with pytest.raises(RankFailed, match="rank 1 hung") as caught:
        run_ranks(sleep_on, 2, 1, timeout=3)
    assert caught.value.outcomes[0].status == "returned"
    assert "in sleep_on" in caught.value.outcomes[1].error


def test_rank_that_cannot_exit_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.workers.GRACE_SECONDS", 1.0)
    with pytest.raises(RankFailed, match="rank 0 hung"):
        run_ranks(keep_a_thread, 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_dead_rank_is_reported_and_the_next_call_works(number: int) -> None:
    with pytest.raises(RankFailed, match=f"rank 0 died with exit code -{int(number)}") as caught:
        run_ranks(die_on, 2, 0, int(number))
    assert [outcome.status for outcome in caught.value.outcomes] == ["died", "returned"]
    assert run_ranks(all_reduce, 2, 0) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_started_ranks_can_be_killed_from_outside() -> None:
    ranks = start_ranks(sleep_on, 2, 0)
    os.kill(ranks.pids[0], signal.SIGKILL)
    killed, survivor = ranks.wait(timeout=30)
    assert (killed.status, killed.exit_code) == ("died", -signal.SIGKILL)
    assert survivor.status == "returned"


def test_no_process_outlives_its_call() -> None:
    with start_ranks(sleep_on, 2, 0) as ranks:
        pids = ranks.pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_forgotten_ranks_are_found_and_killed() -> None:
    ranks = start_ranks(sleep_on, 1, 0)
    assert kill_forgotten() == 1
    assert kill_forgotten() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(ranks.pids[0], 0)


def test_ranks_end_with_the_test_process(tmp_path: Path) -> None:
    script = (
        "import os, tests.workers\n"
        "from tests.test_workers import sleep_on, start_ranks\n"
        "tests.workers._PRELOAD[:] = ['torch']\n"
        "print(*start_ranks(sleep_on, 1, 0).pids, flush=True)\n"
        "os._exit(0)\n"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        pytest.fail(f"rank with pid {pid} outlived its parent")


def test_surroundings_are_those_of_a_launched_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FROM_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    first, second = run_ranks(report_surroundings, 2)
    assert first["environ"] == {"RANK": "0", "WORLD_SIZE": "2", "FROM_TEST": "yes"}
    assert second["environ"] == {"RANK": "1", "WORLD_SIZE": "2", "FROM_TEST": "yes"}
    assert first["cwd"] == second["cwd"] == str(tmp_path)
    assert first["threads"] == 1
    assert first["interrupt"] == signal.SIG_IGN
    assert len({os.getpid(), first["pid"], second["pid"]}) == 3


def test_calls_share_no_state() -> None:
    assert run_ranks(count_calls, 1) == [1]
    assert run_ranks(count_calls, 1) == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, and /proc exists, on Linux")
def test_server_has_one_thread_and_may_fork() -> None:
    assert run_ranks(server_threads, 1) == [1]


def test_result_that_cannot_travel_is_the_ranks_error() -> None:
    with pytest.raises(RankFailed, match=r"rank 0 raised .*Pickl|rank 0 raised .*AttributeError"):
        run_ranks(return_lambda, 1)


def test_output_is_shown_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(print_rank, 2)
    shown = capsys.readouterr().out
    assert "-- output of rank 0 --\nhello from 0\n" in shown
    assert "-- output of rank 1 --\nhello from 1\n" in shown


def test_own_warnings_are_errors_in_ranks() -> None:
    with pytest.raises(RankFailed, match=r"raised builtins\.DeprecationWarning"):
        run_ranks(warn, 1, DeprecationWarning)


def test_warnings_inside_torch_are_not_errors_in_ranks() -> None:
    assert run_ranks(warn_elsewhere, 1) == [None]


def test_store_can_be_lost(tmp_path: Path) -> None:
    ranks = start_ranks(use_lost_store, 2, str(tmp_path))
    while len(list(tmp_path.glob("ready*"))) < 2:
        time.sleep(0.01)
    ranks.stop_store()
    (tmp_path / "stopped").touch()
    assert [outcome.value for outcome in ranks.wait()] == ["DistNetworkError"] * 2
