"""Real processes for tests: runs a function on several ranks joined by a fresh gloo group.

Promises: every call gets new processes and a new store, so that no test sees another's state; no
call outlives its timeout; no process outlives its call, nor the test session. Processes are forked
from a server that has imported torch, the frameworks and the package once, which makes a call cost
about 0.1 s.

    values = run_ranks(fn, 2, "argument")             # fn's return values by rank, or RankFailed
    ranks = start_ranks(fn, 2, "argument")            # the same, for tests which kill ranks
    os.kill(ranks.pids[1], signal.SIGKILL)
    outcomes = ranks.wait(timeout=30)                 # what became of each rank, never raises

``fn`` is a module-level function of a test module; arguments and results must pickle. In it,
``torch.distributed`` is initialised (default group; a ``TCPStore`` hosted by the test process, as
a launcher's agent does), the variables of a torchrun launch are set (``RANK``, ``LOCAL_RANK``,
...), and warnings that our package or a test causes are errors.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, Literal, TypeVar

from tests.rank_process import ONE_THREAD, Job, rank_main

T = TypeVar("T")

# Forking a process with Apple's frameworks loaded is unsafe: there, each rank imports torch anew.
_START_METHOD: Literal["forkserver", "spawn"] = "forkserver" if sys.platform == "linux" else "spawn"
_PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor",
    "lightning.pytorch",
    "accelerate",
    "transformers.trainer",
    "s3fs",
    "zero_ckpt.checkpointer",
]

STARTUP_SECONDS = 100.0  # the server's imports on a busy machine; not part of a call's timeout
GRACE_SECONDS = 10.0  # for the other ranks after one has failed, and for a rank's own exit
_DUMP_SECONDS = 5.0

_running: set[Ranks] = set()

Status = Literal["returned", "raised", "died", "hung"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rank."""

    rank: int
    status: Status
    value: Any = None  # the return value, when it returned
    error_type: str = ""  # "package.module.Class", when it raised
    error: str = ""  # traceback when it raised, stacks of all its threads when it hung
    exit_code: int | None = None  # of the process, when it died: negative is a signal's number
    output: str = ""  # all that it wrote to stdout and stderr

    def describe(self) -> str:
        """One paragraph for a person."""
        what = {
            "returned": "returned",
            "raised": f"raised {self.error_type}",
            "died": f"died with exit code {self.exit_code}",
            "hung": "hung and was killed",
        }[self.status]
        detail = "" if self.status == "returned" else f"\n{self.error or self.output}".rstrip()
        return f"rank {self.rank} {what}{detail}"


class RankFailed(AssertionError):
    """At least one rank did not return. ``rank`` is the first that failed, in time."""

    def __init__(self, outcomes: list[Outcome], failed: list[int]) -> None:
        self.outcomes = outcomes
        self.rank = failed[0]
        others = [outcome.rank for outcome in outcomes if outcome.rank not in failed]
        told = [outcomes[rank].describe() for rank in [*failed, *others]]
        super().__init__("\n\n".join(told))


class Ranks:
    """Running ranks. Use as a context manager, or call ``wait``; both leave no process behind."""

    def __init__(
        self, fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], backend: str
    ) -> None:
        from torch.distributed import TCPStore

        # Plain pickle: multiprocessing's own would move tensors through shared memory, which
        # ties the ranks' lives together.
        payload = pickle.dumps((fn, args))
        self._store: TCPStore | None = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        self._logs = tempfile.TemporaryDirectory(prefix="ranks-")
        self._links: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._outcomes: dict[int, Outcome] = {}
        self.failed: list[int] = []  # in the order of time
        _running.add(self)
        try:
            for rank in range(world_size):
                job = Job(rank, world_size, self._store.port, backend, self._log(rank), payload)
                self._start(job)
            self._await_joined()
        except BaseException:
            self.kill()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes if process.pid is not None]

    def stop_store(self) -> None:
        """End the rendezvous store, as when the process that hosts it dies."""
        self._store = None

    def wait(self, timeout: float = 60, grace: float | None = None) -> list[Outcome]:
        """Outcomes by rank. Whoever is not done ``timeout`` seconds from now has its stacks
        dumped and is killed; ``grace`` shortens that once some rank has failed."""
        deadline = time.monotonic() + timeout
        try:
            while missing := self._missing():
                if not self._receive(missing, deadline):
                    self._record_hung(missing)
                elif grace is not None and self.failed:
                    deadline = min(deadline, time.monotonic() + grace)
                    grace = None
            self._release()
            return [self._outcomes[rank] for rank in sorted(self._outcomes)]
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill whoever still runs, with its descendants, and free everything."""
        for process in self._processes:
            if process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()
        for link in self._links:
            link.close()
        self._logs.cleanup()
        self.stop_store()
        _running.discard(self)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _log(self, rank: int) -> str:
        return str(Path(self._logs.name) / f"rank{rank}.log")

    def _output(self, rank: int) -> str:
        path = Path(self._log(rank))
        return path.read_text(errors="replace") if path.exists() else ""

    def _start(self, job: Job) -> None:
        link, far_end = multiprocessing.Pipe()
        process = _context().Process(
            target=rank_main, args=(job, far_end, dict(os.environ)), name=f"rank {job.rank}"
        )
        with _environment(ONE_THREAD):  # the server's libraries size their thread pools by it
            process.start()
        far_end.close()  # so that the rank's death is an end of file here
        self._links.append(link)
        self._processes.append(process)

    def _await_joined(self) -> None:
        for rank, link in enumerate(self._links):
            if not link.poll(STARTUP_SECONDS):
                raise TimeoutError(f"rank {rank} did not join within {STARTUP_SECONDS:.0f} s")
            with contextlib.suppress(EOFError):  # it died: wait() will tell
                link.recv_bytes()

    def _missing(self) -> list[int]:
        return [rank for rank in range(len(self._links)) if rank not in self._outcomes]

    def _receive(self, ranks: list[int], deadline: float) -> bool:
        """Record the next outcomes; False when none came before the deadline."""
        by_link = {self._links[rank]: rank for rank in ranks}
        ready = wait(list(by_link), max(0.0, deadline - time.monotonic()))
        for link in ready:
            assert isinstance(link, Connection)
            rank = by_link[link]
            try:
                report = pickle.loads(link.recv_bytes())
            except (EOFError, ConnectionResetError):
                self._processes[rank].join()
                self._record(rank, "died", exit_code=self._processes[rank].exitcode)
            else:
                self._record(rank, **report)
        return bool(ready)

    def _record(self, rank: int, status: Status, **fields: Any) -> None:
        self._outcomes[rank] = Outcome(rank, status, output=self._output(rank), **fields)
        if status != "returned" and rank not in self.failed:
            self.failed.append(rank)

    def _record_hung(self, ranks: list[int]) -> None:
        before = {rank: len(self._output(rank)) for rank in ranks}
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.2)
        for rank in ranks:
            self._record(rank, "hung", error=self._dumped(rank, before[rank]))

    def _dumped(self, rank: int, start: int) -> str:
        """The stacks which the rank's faulthandler wrote, once they stop growing."""
        deadline = time.monotonic() + _DUMP_SECONDS
        stacks = self._output(rank)[start:]
        while time.monotonic() < deadline:
            time.sleep(0.1)
            longer = self._output(rank)[start:]
            if longer and longer == stacks:
                break
            stacks = longer
        return stacks or f"(no stacks within {_DUMP_SECONDS:.0f} s: stopped, or in the kernel)"

    def _release(self) -> None:
        """Let the ranks which returned leave the group; all must then exit by themselves."""
        done = [rank for rank, outcome in self._outcomes.items() if outcome.status != "hung"]
        for rank in done:
            with contextlib.suppress(OSError):
                self._links[rank].send_bytes(b"leave")
        deadline = time.monotonic() + GRACE_SECONDS
        for rank in done:
            self._processes[rank].join(max(0.0, deadline - time.monotonic()))
        if stuck := [rank for rank in done if self._processes[rank].is_alive()]:
            self._record_hung(stuck)


def start_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo"
) -> Ranks:
    """Start ``fn(*args)`` on ``world_size`` ranks, and return while it runs."""
    return Ranks(fn, world_size, args, backend)


def run_ranks(
    fn: Callable[..., T], world_size: int, *args: Any, timeout: float = 60, backend: str = "gloo"
) -> list[T]:
    """Run ``fn(*args)`` on ``world_size`` ranks and return its values by rank.

    Raises RankFailed, with tracebacks, exit codes or stacks, when any rank raises, dies, or is
    not done after ``timeout`` seconds (start-up not counted).
    """
    ranks = start_ranks(fn, world_size, *args, backend=backend)
    outcomes = ranks.wait(timeout, grace=GRACE_SECONDS)
    for outcome in outcomes:
        if outcome.output:
            print(f"-- output of rank {outcome.rank} --\n{outcome.output}")
    if ranks.failed:
        raise RankFailed(outcomes, ranks.failed)
    return [outcome.value for outcome in outcomes]


def kill_forgotten() -> int:
    """Kill all ranks which nobody waited for; their number of calls."""
    forgotten = list(_running)
    for ranks in forgotten:
        ranks.kill()
    return len(forgotten)


def _context() -> ForkServerContext | SpawnContext:
    if sys.platform != "linux":  # forking is unsafe there: each rank imports torch anew
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
