"""Saves beside the training: they hold what was there when they were asked for, and commit as any other."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.decoupled.jobs import STAGES, Gate, Run, same, saved_behind, storage
from tests.told import told_once, warned
from tests.workers import run_ranks, start_ranks
from zero_ckpt import AsyncSave, Checkpointer
from zero_ckpt.core import decoupled, flight
from zero_ckpt.core.decoupled import AsyncEngine
from zero_ckpt.core.finding import list_tags
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.tags import read_latest
from zero_ckpt.errors import ConfigurationError, RankTimeoutError, SaveError, StateMismatchError
from zero_ckpt.testing.faults import Operation


def tags_in(directory: str) -> list[str]:
    infos = list_tags(LocalStorage(), directory)
    return [info.name for info in infos if info.summary is not None]


def _save_and_train_on(stage: str, directory: str) -> bool:
    run = Run(stage, engine="async")
    run.step()
    client_state = {"grads": torch.ones(3), "epoch": 1}
    before = run.state()
    handle = run.save(directory, "a", client_state=client_state)
    client_state["grads"].zero_()
    for _ in range(3):
        run.step()
    assert not same(run.state(), before)
    handle.wait()
    assert handle.committed
    path, found = run.checkpointer.load_checkpoint(directory)
    assert path == handle.path
    assert found["grads"].tolist() == [1, 1, 1]
    return same(run.state(), before)


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_holds_what_was_there_when_it_was_asked_for(tmp_path: Path, stage: str) -> None:
    assert run_ranks(_save_and_train_on, 2, stage, str(tmp_path)) == [True, True]


def _step_before_it_is_staged(directory: str) -> tuple[bool, bool]:
    gate, run, before = saved_behind(directory)
    run.forward()  # changes what batch norm has counted
    opened = threading.Event()
    timer = threading.Timer(0.3, lambda: (opened.set(), gate.open()))
    timer.start()
    run.optimizer.step()
    has_waited = opened.is_set()
    run.checkpointer.wait()
    run.checkpointer.load_checkpoint(directory)
    return has_waited, same(run.state(), before)


def test_an_optimizer_step_waits_until_all_is_copied(tmp_path: Path) -> None:
    assert run_ranks(_step_before_it_is_staged, 2, str(tmp_path)) == [(True, True)] * 2


def _save_in_pieces(directory: str) -> tuple[bool, list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zero_ckpt").addHandler(handler)
    model = nn.Linear(4096, 4096)  # 64 MiB, half of it on each rank
    options = AsyncSave(staging_bytes=24 << 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpointer = Checkpointer(model, optimizer, engine=options)
    before = model.weight.detach().clone()
    for tag in ("a", "b"):
        handle = checkpointer.save_checkpoint(directory, tag=tag)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        handle.wait()
    nbytes = checkpointer._engine._pool.nbytes  # type: ignore[union-attr]
    checkpointer.load_checkpoint(directory, tag="a")
    return torch.equal(model.weight, before) and nbytes == 24 << 20, said


def test_a_state_larger_than_the_staging_memory_is_staged_in_pieces(tmp_path: Path) -> None:
    (is_right, said), other = run_ranks(_save_in_pieces, 2, str(tmp_path))
    assert is_right
    assert "staging memory for 0.03 GB" in said[0]
    assert len(said) == 1
    assert other == (True, [])


def _fail_once(directory: str, surface: str) -> tuple[str, str, str]:
    failing = [False]

    def hook(operation: Any) -> None:
        if failing[0] and dist.get_rank() == 1:
            raise OSError(28, "No space left on device", operation.path)

    run = Run(engine="async", storage=storage(hook, "write"))
    run.step()
    run.save(directory, "good")
    run.step()
    run.checkpointer.wait()
    failing[0] = True
    handle = run.save(directory, "bad")
    run.step()
    with pytest.raises(SaveError) as raised:
        {
            "next save": lambda: run.save(directory, "next"),
            "wait": run.checkpointer.wait,
            "handle": handle.wait,
            "close": run.checkpointer.close,
            "load": lambda: run.checkpointer.load_checkpoint(directory),
        }[surface]()
    failing[0] = False
    assert not handle.committed
    assert not flight._UNTOLD, "a failure that was told is let go"
    latest = read_latest(LocalStorage(), directory)
    run.save(directory, "after").wait()
    run.checkpointer.close()
    return str(raised.value), latest or "", " ".join(sorted(tags_in(directory)))


@pytest.mark.parametrize("surface", ["next save", "wait", "handle", "close", "load"])
def test_a_failure_is_raised_on_every_rank_and_moves_nothing(tmp_path: Path, surface: str) -> None:
    first, second = run_ranks(_fail_once, 2, str(tmp_path), surface)
    assert first == second
    text, latest, tags = first
    assert "rank 1" in text
    assert "No space left" in text
    assert latest == "good"
    assert tags == "after good"


def _policies(directory: str, when_busy: str) -> tuple[list[bool], list[bool], str, list[str]]:
    gate = Gate()

    def hook(operation: Operation) -> None:
        if operation.path.endswith("manifest.json"):
            gate(operation)

    run = Run(engine=AsyncSave(when_busy=when_busy), storage=storage(hook, "put"))
    run.step()
    first = run.save(directory, "first")
    run.step()
    if dist.get_rank() == 0:
        assert gate.reached.wait(20)  # its manifest is being put: too late to give it up
    dist.barrier()
    if when_busy == "skip":
        second = run.save(directory, "second")
        gate.open()
    else:
        threading.Timer(0.3, gate.open).start()
        second = run.save(directory, "second")
    run.step()
    run.checkpointer.wait()
    third = run.save(directory, "third")
    third.wait()
    handles = (first, second, third)
    latest = read_latest(LocalStorage(), directory) or ""
    return (
        [h.committed for h in handles],
        [h.skipped for h in handles],
        latest,
        sorted(tags_in(directory)),
    )


@pytest.mark.parametrize("when_busy", ["wait", "skip", "replace"])
def test_a_save_while_another_is_under_way(tmp_path: Path, when_busy: str) -> None:
    results = run_ranks(_policies, 2, str(tmp_path), when_busy)
    skipped = when_busy == "skip"
    for committed, was_skipped, latest, tags in results:
        assert committed == [True, not skipped, True]
        assert was_skipped == [False, skipped, False]
        assert latest == "third"
        assert tags == sorted({"first", "third"} if skipped else {"first", "second", "third"})


def _replace(directory: str) -> tuple[bool, str, list[str]]:
    gate = Gate()
    run = Run(engine=AsyncSave(when_busy="replace"), storage=storage(gate, "write"))
    run.step()
    first = run.save(directory, "first")
    assert gate.reached.wait(20)
    threading.Timer(0.3, gate.open).start()
    _, texts = warned(run.save, directory, "second")
    assert ["given up for a newer save" in text for text in texts] == [True] * (not dist.get_rank())
    run.checkpointer.wait()
    with pytest.raises(SaveError, match="given up"):
        first.wait()
    return first.committed, read_latest(LocalStorage(), directory) or "", tags_in(directory)


def test_a_save_that_is_replaced_leaves_nothing(tmp_path: Path) -> None:
    assert run_ranks(_replace, 2, str(tmp_path)) == [(False, "second", ["second"])] * 2
    assert sorted(os.listdir(tmp_path)) == ["latest", "second"]


def _two_in_flight(directory: str, tags: tuple[str, str]) -> tuple[list[bool], str, bool]:
    gate = Gate()
    options = AsyncSave(max_in_flight=2)
    run = Run(engine=options, storage=storage(gate, "write"))
    run.step()
    first = run.save(directory, tags[0])
    run.step()
    before = run.state()
    second = run.save(directory, tags[1])
    was_pending = [first.committed, second.committed]
    gate.open()
    run.step()
    run.checkpointer.wait()
    latest = read_latest(LocalStorage(), directory) or ""
    run.checkpointer.load_checkpoint(directory)
    return was_pending, latest, same(run.state(), before)


@pytest.mark.parametrize("tags", [("a", "b"), ("a", "a")])
def test_saves_in_flight_together_commit_in_order(tmp_path: Path, tags: tuple[str, str]) -> None:
    results = run_ranks(_two_in_flight, 2, str(tmp_path), tags)
    assert results == [([False, False], tags[1], True)] * 2


def _fail_in_flight(directory: str, tags: list[str]) -> tuple[str, list[str], list[str]]:
    """Saves `tags` at once, of which those called bad fail; then, that known to one rank, the next."""

    def hook(operation: Operation) -> None:
        if "bad" in operation.path and dist.get_rank() == 1:
            raise OSError(28, "No space left on device", operation.path)

    run = Run(engine=AsyncSave(max_in_flight=3), storage=storage(hook, "write"))
    run.step()
    handles = [run.save(directory, tag) for tag in tags]
    if dist.get_rank() == 0:
        for handle in handles:
            handle.join()  # type: ignore[attr-defined]
    dist.barrier()

    def next_save() -> str:
        with pytest.raises(SaveError) as raised:
            run.save(directory, "next")
        return str(raised.value)

    text, others = warned(next_save)
    run.save(directory, "after")
    run.checkpointer.close()
    return text, others, tags_in(directory)


def test_a_failure_in_flight_with_others_is_raised_by_the_next_save(tmp_path: Path) -> None:
    for text, others, tags in run_ranks(_fail_in_flight, 2, str(tmp_path), ["bad", "good"]):
        assert "/bad/" in text
        assert not others
        assert sorted(tags) == ["after", "good"]


def test_each_of_several_failures_is_told(tmp_path: Path) -> None:
    results = run_ranks(_fail_in_flight, 2, str(tmp_path), ["bad1", "bad2"])
    (other,) = told_once([others for _, others, _ in results])
    assert "bad2 was not saved, either: rank 1" in other
    for text, _, tags in results:
        assert "/bad1/" in text
        assert tags == ["after"]


def _change_too_early(directory: str) -> str:
    gate = Gate()
    run = Run(engine="async", storage=storage(gate, "create"))
    run.step()
    handle = run.save(directory, "a")
    assert gate.reached.wait(20)
    with torch.no_grad():
        run.model.get_parameter("out.weight").add_(1)
    gate.open()
    with pytest.raises(StateMismatchError) as raised:
        handle.wait()
    return str(raised.value)


def test_weights_that_change_before_they_are_copied_are_found(tmp_path: Path) -> None:
    for text in run_ranks(_change_too_early, 2, str(tmp_path)):
        assert "'out.weight'" in text
        assert "staged()" in text
    assert tags_in(str(tmp_path)) == []


@pytest.mark.parametrize("check", [True, False])
def test_check_staging_finds_changes_that_leave_no_trace(tmp_path: Path, check: bool) -> None:
    model = nn.Linear(4, 4)

    def change(operation: Operation) -> None:
        model.weight.data.add_(1)

    engine = AsyncSave(check_staging=check)
    checkpointer = Checkpointer(model, engine=engine, storage=storage(change, "create"))
    handle = checkpointer.save_checkpoint(tmp_path, tag="a")
    if check:
        with pytest.raises(StateMismatchError, match="'weight'"):
            handle.wait()
    else:
        handle.wait()


def _die_while_writing(directory: str) -> str:
    gate = Gate()
    run = Run(engine="async", storage=storage(gate, "write"))
    run.step()
    run.save(directory, "a")
    assert gate.reached.wait(20)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    gate.open()
    with pytest.raises(RankTimeoutError) as raised:
        run.checkpointer.wait()
    return str(raised.value)


def test_a_rank_that_dies_while_it_writes_is_named(tmp_path: Path) -> None:
    with start_ranks(_die_while_writing, 2, str(tmp_path)) as ranks:
        survivor, dead = ranks.wait(timeout=60)
    assert dead.status == "died"
    assert "rank 1 died" in survivor.value
    assert tags_in(str(tmp_path)) == []


def test_a_directory_that_is_deleted_meanwhile_is_told_and_the_next_save_works(
    tmp_path: Path,
) -> None:
    gate, directory = Gate(), tmp_path / "run"
    with Checkpointer(nn.Linear(2, 2), engine="async", storage=storage(gate, "sync")) as one:
        handle = one.save_checkpoint(directory, tag="a")
        assert gate.reached.wait(20)
        shutil.rmtree(directory)
        gate.open()
        with pytest.raises(SaveError, match=r"\(\.saving-.*removed files of this directory"):
            handle.wait()
        assert not directory.exists()
        one.save_checkpoint(directory, tag="b").wait()
    assert tags_in(str(directory)) == ["b"]


SCRIPT = """
import sys, time, torch, zero_ckpt
from concurrent.futures import ThreadPoolExecutor
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.testing.faults import FaultyStorage

def slow(operation):
    print("writing", flush=True)
    time.sleep(1)
    ThreadPoolExecutor(1).submit(int).result()  # as clients of object stores look up addresses
    if "{mode}" == "fail":
        raise OSError(28, "No space left on device")

storage = FaultyStorage(LocalStorage(), slow, names=["write"])
checkpointer = zero_ckpt.Checkpointer(torch.nn.Linear(2, 2), engine="async", storage=storage)
checkpointer.save_checkpoint(sys.argv[1], tag="a")
if "{mode}" == "raise":
    raise RuntimeError("the script ends like this")
if "{mode}" == "term":
    time.sleep(60)
"""


def run_script(directory: Path, mode: str, script: str = SCRIPT) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script.format(mode=mode), str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("mode", ["end", "raise", "fail"])
def test_a_process_does_not_exit_before_its_save_has_ended(tmp_path: Path, mode: str) -> None:
    process = run_script(tmp_path, mode)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (mode != "end")
    assert tags_in(str(tmp_path)) == ([] if mode == "fail" else ["a"])
    assert ("was not saved" in errors) == (mode == "fail")


def test_sigterm_finishes_the_commit_first(tmp_path: Path) -> None:
    process = run_script(tmp_path, "term")
    assert process.stdout is not None
    assert process.stdout.read(7) == "writing"  # by one thread or another
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert tags_in(str(tmp_path)) == ["a"]


def test_sigterm_waits_for_the_saves_of_all_engines(tmp_path: Path) -> None:
    """The one that installed the handler has nothing to do any more; another has."""
    (tmp_path / "first").mkdir()
    script = SCRIPT.replace(
        "checkpointer = ",
        "first = zero_ckpt.Checkpointer(torch.nn.Linear(2, 2), engine='async')\n"
        "first.save_checkpoint(sys.argv[1] + '/first', tag='a').wait()\n"
        "checkpointer = ",
    )
    process = run_script(tmp_path, "term", script)
    assert process.stdout is not None
    assert process.stdout.read(7) == "writing"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert tags_in(str(tmp_path)) == ["a"]


def test_a_handler_of_the_users_keeps_the_signal(tmp_path: Path) -> None:
    seen: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with Checkpointer(nn.Linear(2, 2), engine="async") as checkpointer:
            checkpointer.save_checkpoint(tmp_path, tag="a")
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


@pytest.mark.parametrize(
    "wrong",
    [{"when_busy": "never"}, {"max_in_flight": 0}, {"grace": -1}, {"staging_bytes": 1 << 20}],
)
def test_senseless_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        AsyncSave(**wrong)
    with pytest.raises(ConfigurationError, match="engine='later'"):
        Checkpointer(nn.Linear(1, 1), engine="later")


def test_an_engine_that_is_closed_before_it_is_warm_keeps_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[threading.Thread] = []
    monkeypatch.setattr(decoupled, "start_thread", begun.append)
    engine = AsyncEngine(AsyncSave(staging_bytes=16 * BLOCK))
    engine.warm([nn.Linear(2, 2)], True)
    pool = engine._pool
    assert pool is not None
    engine.close()
    begun[0].start()
    begun[0].join()
    assert engine._pool is None
    assert pool.count == 0
    engine.warm([nn.Linear(2, 2)], True)
    begun[1].start()
    begun[1].join()
    assert engine._pool is not None
    assert engine._pool.count == 7
    engine.close()
