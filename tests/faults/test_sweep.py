"""Fail every operation of a save in turn, with every error: nothing is lost, nothing leaks, and the next save works.

On the disk the operations are the system calls; on an object store and in memory they are those of the storage.
Two ranks, as threads.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.failing_calls import Call, failing_calls
from tests.faults.jobs import contents, resources
from tests.faults.team import ENGINES, Team
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.object_storage import ObjectStorage
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import SaveError
from zero_ckpt.testing import FaultyStorage, Operation

WORLD = 2

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EINTR", "short")
"""`short`: a write that takes half of its bytes, and then the disk is full."""

SCENARIOS = {"new tag": "new", "overwrite": "old"}

long = [pytest.mark.torture, pytest.mark.timeout(3600)]


class Sweep:
    """Saves that fail, each on a place that holds the checkpoint `old` of step 1.

    `restore` brings that place back; `files` lists what lies there.
    """

    def __init__(
        self,
        root: str,
        storage: Storage,
        engine: str,
        tag: str,
        restore: Callable[[], None],
        files: Callable[[], list[str]],
    ) -> None:
        self.root, self.storage, self.tag = root, storage, tag
        self._restore, self._files = restore, files
        self.team = Team(WORLD, storage, engine)
        self.start = self._files()
        self.old = contents(root, storage=storage)
        self.team.save(root, tag, 2)
        self.new, self.end = contents(root, storage=storage), self._files()
        self.resources, self.handles = resources(), handles()

    def check(self, save: Callable[[], list[BaseException | None]]) -> str:
        """One save that goes wrong, and the one that follows it; what is wrong with them, or ""."""
        self._restore()
        errors = save()
        kinds = {type(error) for error in errors}
        state = contents(self.root, storage=self.storage)
        if kinds == {SaveError}:
            durable = "did not make it durable" in str(errors[0])
            if len({str(error) for error in errors}) > 1:
                return f"the ranks raise different errors: {errors}"
            if not durable and state != self.old:
                return "the save failed, and the old checkpoint is not what is loaded"
            if not durable and self._files() != self.start:
                return f"left behind: {sorted(set(self._files()) ^ set(self.start))}"
        elif kinds != {type(None)}:
            return f"the ranks end differently: {errors}"
        elif state not in (self.old, self.new):
            return "neither the old nor the new state is loaded"
        again = self.team.save(self.root, self.tag, 2)
        if again != [None] * WORLD:
            return f"the next save fails: {again}"
        if contents(self.root, storage=self.storage) != self.new:
            return "the next save does not store its state"
        return self._leaks()

    def _leaks(self) -> str:
        settled = time.monotonic() + 2  # a thread may be about to end
        while handles() != self.handles and time.monotonic() < settled:
            time.sleep(0.001)
        if handles() != self.handles and resources() != self.resources:
            return f"leaked: {resources()}, before: {self.resources}"
        pools = [engine._pool for engine in self.team.engines]
        if any(pool._free.qsize() != pool.count for pool in pools):
            return f"lost staging buffers: {[pool._free.qsize() for pool in pools]} are left"
        stray = [name for name in self._files() if name.endswith(".tmp")]
        return f"left behind: {stray}" if stray else ""


def handles() -> tuple[int, int]:
    """Open files and threads: quickly counted, what is garbage included."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def chosen(count: int, thorough: bool) -> Iterator[tuple[int, str]]:
    """(operation, error): all pairs, or every operation with one error, all errors in turn."""
    if thorough:
        yield from itertools.product(range(count), ERRORS)
    else:
        yield from zip(range(count), itertools.cycle(ERRORS))


def make_fault(
    kind: str, hit: Callable[[Any], bool]
) -> Callable[[Call, Any, tuple[Any, ...]], Any]:
    def fault(call: Call, function: Any, args: tuple[Any, ...]) -> Any:
        if not hit(call):
            return function(*args)
        if call[0] == "close":
            function(*args)  # as Linux does: the descriptor is gone, whatever close says
        if kind == "short":
            if call[0] == "pwrite" and len(args[1]) > 4096:
                return function(args[0], args[1][: len(args[1]) // 2 // 512 * 512], args[2])
            kind_of_error = errno.ENOSPC
        else:
            kind_of_error = getattr(errno, kind)
        raise OSError(kind_of_error, os.strerror(kind_of_error), call[1])

    return fault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=long)])
@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_system_call_of_a_save_may_fail(
    scenario: str, engine: str, thorough: bool, folder: Path
) -> None:
    template = folder.with_name("template")
    Team(WORLD, LocalStorage(), engine).save(folder, "old", 1)
    shutil.copytree(folder, template)

    def restore() -> None:
        shutil.rmtree(folder)
        shutil.copytree(template, folder)

    def files() -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))

    sweep = Sweep(str(folder), LocalStorage(), engine, SCENARIOS[scenario], restore, files)
    restore()
    with failing_calls(folder) as probe:
        sweep.team.save(folder, sweep.tag, 2)
    calls = sorted(probe.seen)
    assert len(calls) > 40
    broken = []
    for number, kind in chosen(len(calls), thorough):

        def save(number: int = number, kind: str = kind) -> list[BaseException | None]:
            with failing_calls(folder, make_fault(kind, lambda call: call == calls[number])):
                return sweep.team.save(folder, sweep.tag, 2)

        if text := sweep.check(save):
            broken.append(f"{kind} at {calls[number]}: {text}")
    assert broken == []


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=long)])
@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_operation_on_an_object_store_may_fail(
    scenario: str, engine: str, thorough: bool
) -> None:
    root = "memory://sweep/run"
    store = ObjectStorage("memory")
    objects: dict[str, Any] = store._system.store
    objects.clear()
    hooks: list[Callable[[Operation], None]] = [lambda _: None]
    storage = FaultyStorage(store, lambda operation: hooks[0](operation))
    Team(WORLD, store, engine).save(root, "old", 1)
    before = dict(objects)

    def restore() -> None:
        objects.clear()
        objects.update(before)

    sweep = Sweep(root, storage, engine, SCENARIOS[scenario], restore, lambda: sorted(objects))
    restore()
    storage.log.clear()
    sweep.team.save(root, sweep.tag, 2)
    operations = list(storage.log)
    assert len(operations) > 25
    broken = []
    for number, kind in chosen(len(operations), thorough):
        code = errno.ENOSPC if kind == "short" else getattr(errno, kind)

        def save(number: int = number, code: int = code) -> list[BaseException | None]:
            storage.log.clear()

            def fail(operation: Operation) -> None:
                if operation.number == number:
                    raise OSError(code, os.strerror(code), operation.path)

            hooks[0] = fail
            try:
                return sweep.team.save(root, sweep.tag, 2)
            finally:
                hooks[0] = lambda _: None

        if text := sweep.check(save):
            broken.append(f"{kind} at {operations[number]}: {text}")
    assert broken == []


def test_a_sweep_finds_what_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a commit that forgets to clean up after itself: so the sweeps can fail."""
    from zero_ckpt.core import commit

    Team(WORLD, LocalStorage()).save(folder, "old", 1)
    sweep = Sweep(
        str(folder),
        LocalStorage(),
        "sync",
        "new",
        lambda: None,
        lambda: sorted(p.name for p in folder.rglob("*")),
    )
    shutil.rmtree(folder / "new")
    (folder / "latest").write_text("old\n")
    sweep.start = sorted(p.name for p in folder.rglob("*"))
    monkeypatch.setattr(commit, "discard", lambda *_: None)

    def save() -> list[BaseException | None]:
        fault = make_fault("EIO", lambda call: call[:2] == ("fsync", "new/manifest.json.tmp"))
        with failing_calls(folder, fault):
            return sweep.team.save(folder, "new", 2)

    assert sweep.check(save).startswith("left behind: ")
