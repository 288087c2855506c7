"""The control plane: how the ranks of a job agree, vote and learn the outcome. Small messages only.

Messages travel through the rendezvous store that every torch process group already has, polled, never blocking in it.
So nothing here is a collective of a process group: it may run on any thread and in any order with training traffic, a
rank that never comes is named instead of hanging the others, and a failed meeting leaves nothing behind that could
disturb the next one.

A rank counts as lost when it has died on this host, or has neither arrived nor made progress (`beat`) for `timeout`
seconds. So the time limit bounds silence, not the length of a save on a slow disk.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from zero_ckpt.errors import RankTimeoutError, SaveError, ZeroCkptError, by_name

__all__ = ["ControlPlane", "LocalControl", "StoreControl", "control_for_process_group"]

DEFAULT_TIMEOUT = 300.0
"""Seconds of silence after which a rank counts as lost."""

Decide = Callable[[list[bytes]], bytes]


class ControlPlane(Protocol):
    """`meet` is called by every rank with the same `phase`; only rank 0's `decide` runs."""

    rank: int
    world_size: int

    def meet(self, phase: str, record: bytes, decide: Decide, timeout: float) -> bytes:
        """Hand `record` to rank 0, whose `decide(records by rank)` gives the answer that every rank gets.

        An error that `decide` raises is raised on every rank. Raises `RankTimeoutError` naming lost ranks.
        """

    def beat(self) -> None:
        """Tell the others that this rank is making progress. Cheap; called from any thread."""


class LocalControl:
    """One process: it agrees with itself."""

    rank = 0
    world_size = 1

    def meet(self, phase: str, record: bytes, decide: Decide, timeout: float) -> bytes:
        return decide([record])

    def beat(self) -> None:
        pass


def control_for_process_group() -> ControlPlane:
    """The control plane of the default process group, or of this process when there is none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return LocalControl()
    store: Any = dist.distributed_c10d._get_default_store()
    with suppress(AttributeError, RuntimeError):
        store = store.clone()  # a connection of our own: others may block in theirs
    return StoreControl(store, dist.get_rank(), dist.get_world_size())


class StoreControl:
    """Meetings through a torch `Store`: each rank leaves a request, rank 0 answers every one.

    A request carries a random nonce that its answer is filed under, so answers never meet the wrong call, and a
    rank that gave up withdraws its request.
    """

    def __init__(self, store: Any, rank: int, world_size: int, name: str = "main") -> None:
        self._store = store
        self.rank = rank
        self.world_size = world_size
        self._prefix = f"zero_ckpt/{name}"
        self._last_beat = 0.0
        self._beats = 0
        self._put(f"who/{rank}", json.dumps(_identity()).encode())

    def meet(self, phase: str, record: bytes, decide: Decide, timeout: float) -> bytes:
        try:
            if self.rank == 0:
                return self._lead(phase, record, decide, timeout)
            return self._follow(phase, record, timeout)
        except RuntimeError as error:  # every c10d store error is one
            if isinstance(error, ZeroCkptError):
                raise
            raise RankTimeoutError(
                f"{phase}: rank {self.rank} lost the rendezvous store, which rank 0 or the launcher holds: {error}"
            ) from error

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= 1.0:
            self._last_beat = now
            self._beats += 1
            with suppress(RuntimeError):
                self._put(f"beat/{self.rank}", str(self._beats).encode())

    def _lead(self, phase: str, record: bytes, decide: Decide, timeout: float) -> bytes:
        others = range(1, self.world_size)
        try:
            self._await_requests(phase, others, timeout)
            requests = {rank: self._take(f"request/{rank}") for rank in others}
        except ZeroCkptError as error:
            present = [rank for rank in others if self._has(f"request/{rank}")]
            self._answer((self._take(f"request/{rank}") for rank in present), _failure(error))
            raise
        try:
            for rank, (_, its_phase, _) in requests.items():
                if its_phase != phase:
                    raise SaveError(
                        f"rank {rank} is in '{its_phase}' while rank 0 is in '{phase}': "
                        "every rank must make the same calls in the same order"
                    )
            answer = decide([record, *(requests[rank][2] for rank in others)])
        except BaseException as error:
            self._answer(requests.values(), _failure(error))
            raise
        self._answer(requests.values(), b"+" + answer)
        return answer

    def _follow(self, phase: str, record: bytes, timeout: float) -> bytes:
        nonce = uuid.uuid4().hex
        header = json.dumps([nonce, phase]).encode()
        self._put(f"request/{self.rank}", header + b"\n" + record)
        try:
            self._await(f"answer/{nonce}", phase, timeout)
        except BaseException:
            with suppress(RuntimeError):
                self._store.delete_key(f"{self._prefix}/request/{self.rank}")
            raise
        answer = self._get(f"answer/{nonce}")
        with suppress(RuntimeError):
            self._store.delete_key(f"{self._prefix}/answer/{nonce}")
        if answer[:1] == b"+":
            return answer[1:]
        name, message = json.loads(answer[1:])
        raise by_name(name, message)

    def _await_requests(self, phase: str, ranks: range, timeout: float) -> None:
        watch = _Watch(self, phase, timeout)
        keys = [f"{self._prefix}/request/{rank}" for rank in ranks]
        for pause in _pauses():
            if self._store.check(keys):
                return
            if watch.is_due():
                watch.check(rank for rank in ranks if not self._has(f"request/{rank}"))
                self.beat()
            time.sleep(pause)

    def _await(self, key: str, phase: str, timeout: float) -> None:
        watch = _Watch(self, phase, timeout)
        for pause in _pauses():
            if self._has(key):
                return
            if watch.is_due():
                watch.check([0])
            time.sleep(pause)

    def _take(self, key: str) -> tuple[str, str, bytes]:
        """(nonce, phase, record) of a request, removed from the store."""
        header, _, record = self._get(key).partition(b"\n")
        self._store.delete_key(f"{self._prefix}/{key}")
        nonce, phase = json.loads(header)
        return nonce, phase, record

    def _answer(self, requests: Iterable[tuple[str, str, bytes]], answer: bytes) -> None:
        for nonce, _, _ in requests:
            self._put(f"answer/{nonce}", answer)

    def _put(self, key: str, value: bytes) -> None:
        self._store.set(f"{self._prefix}/{key}", value)

    def _has(self, key: str) -> bool:
        return bool(self._store.check([f"{self._prefix}/{key}"]))

    def _get(self, key: str) -> bytes:
        return bytes(self._store.get(f"{self._prefix}/{key}"))

    def peek(self, key: str) -> bytes | None:
        """A key's value if it is there."""
        return self._get(key) if self._has(key) else None


class _Watch:
    """Decides which of the awaited ranks are lost. Looks once a second, or oftener for short timeouts."""

    def __init__(self, control: StoreControl, phase: str, timeout: float) -> None:
        self._control, self._phase, self._timeout = control, phase, timeout
        self._interval = min(1.0, timeout / 4)
        self._next = time.monotonic() + self._interval
        self._started = time.monotonic()
        self._seen: dict[int, tuple[bytes | None, float]] = {}

    def is_due(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._interval
        return True

    def check(self, ranks: Iterable[int]) -> None:
        dead, silent = [], []
        for rank in ranks:
            if self._is_dead(rank):
                dead.append(rank)
            elif self._is_silent(rank):
                silent.append(rank)
        if dead or silent:
            raise RankTimeoutError(_lost_message(self._phase, dead, silent, self._timeout))

    def _is_dead(self, rank: int) -> bool:
        who = self._control.peek(f"who/{rank}")
        return who is not None and _has_died(json.loads(who))

    def _is_silent(self, rank: int) -> bool:
        now, beat = time.monotonic(), self._control.peek(f"beat/{rank}")
        last, since = self._seen.get(rank, (beat, self._started))
        if beat != last:
            since = now
        self._seen[rank] = beat, since
        return now - since > self._timeout


def _lost_message(phase: str, dead: list[int], silent: list[int], timeout: float) -> str:
    parts = []
    if dead:
        parts.append(f"{_ranks(dead)} died")
    if silent:
        parts.append(f"{_ranks(silent)} did not arrive or make progress for {timeout:g} s")
    return (
        f"{phase}: {' and '.join(parts)}. Every rank must make this call; look at the log of the rank named here. "
        "Nothing was committed by this call, and earlier checkpoints are intact."
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _failure(error: BaseException) -> bytes:
    name = type(error).__name__
    return b"-" + json.dumps([name, str(error)]).encode()


def _pauses() -> Iterable[float]:
    """Short at first, since ranks mostly arrive together; then up to 20 ms."""
    pause = 0.0002
    while True:
        yield pause
        pause = min(pause * 1.3, 0.02)


def _identity() -> list[str | int]:
    """Host, process namespace, process and its start: enough for a process on this host to tell whether it lives."""
    return [*_host(), os.getpid(), _start_time(os.getpid()) or ""]


def _host() -> tuple[str, str]:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    return "", ""


def _start_time(pid: int) -> str | None:
    """Clock ticks since boot at which a process started; None when it is gone or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _has_died(who: list[Any]) -> bool:
    boot, namespace, pid, started = who
    if not boot or not started or (boot, namespace) != _host():
        return False
    return bool(_start_time(pid) != started)
