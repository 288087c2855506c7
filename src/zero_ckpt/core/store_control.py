"""The control plane of several ranks, over the rendezvous store that every torch process group already has.

The store is polled, never blocked in; one that does not answer for `timeout` seconds is given up on.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from zero_ckpt.core.consequences import consequence, lost_error, shared_error
from zero_ckpt.core.line import Line, StoreError
from zero_ckpt.core.session import opened_session, session_to_join
from zero_ckpt.core.watch import Watch, identity, name_ranks
from zero_ckpt.errors import DisagreementError, by_name

__all__ = ["DEFAULT_TIMEOUT", "Decide", "StoreControl", "longest_pause"]

_logger = logging.getLogger("zero_ckpt")

_BEAT_INTERVAL = 0.25
"""Seconds. Well below any time limit that makes sense, and seldom enough to cost nothing."""

_LOOKS_PER_SECOND = 20_000
"""By all waiting ranks together. A store answers many more, so that rank 0's own calls do not queue behind these."""

DEFAULT_TIMEOUT = 300.0
"""Seconds of silence after which a rank counts as lost."""

_STORE_TIMEOUT = timedelta(seconds=10)
"""How long the store's client waits for a key: one may have been removed between two looks, or the store has ended."""

Decide = Callable[[list[bytes]], bytes]
"""Rank 0's answer to the records of all ranks, by rank."""

_ABSENT = "\0absent"
"""What a store answers to `compare_set` when the key is not there; no value is like it."""


def _connected_anew(store: Any) -> Any:
    """The store over a connection of our own, since others may block in theirs; itself where it cannot be cloned."""
    with suppress(AttributeError, RuntimeError):
        store = store.clone()
        store.set_timeout(_STORE_TIMEOUT)
    return store


@dataclass(frozen=True, slots=True)
class _Request:
    """What a rank brings to a meeting; its answer is filed under `nonce`."""

    rank: int
    nonce: str
    phase: str
    record: bytes


class StoreControl:
    """Meetings through a torch `Store`: each rank leaves a request, rank 0 answers every one.

    A request carries a random nonce that its answer is filed under, so answers never meet the wrong call. Deleting a
    request decides what becomes of it: rank 0 claims it by that, and a rank that gave up withdraws it by that. What was
    withdrawn is never decided on.

    Every call to the store is made on its `Line`, where it cannot stop this rank.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, name: str = "main", *, connect: bool = False
    ) -> None:
        self._line = Line()
        self._store = store
        self.rank = rank
        self.world_size = world_size
        self._name = name
        self._session = ""
        self._last_beat = 0.0
        self._beats = 0
        with self._reaching_store("start"):
            if connect:  # all ranks of a large job come at once
                (self._store,) = self._line.ask([lambda: _connected_anew(store)], DEFAULT_TIMEOUT)
            self._line.ask([self._join], DEFAULT_TIMEOUT)

    def meet(self, phase: str, record: bytes, decide: Decide, timeout: float) -> bytes:
        if self.rank == 0:
            return self._lead(phase, record, decide, timeout)
        return self._follow(phase, record, timeout)

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= _BEAT_INTERVAL:
            self._last_beat = now
            self._beats += 1
            beats = str(self._beats).encode()
            self._line.tell(lambda: self._put(f"beat/{self.rank}", beats))

    @contextmanager
    def _reaching_store(self, phase: str, *, decided: bool = False) -> Iterator[None]:
        """Around calls of the store. `decided`: rank 0 may have decided."""
        try:
            yield
        except StoreError as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise lost_error(
                phase,
                f"rank {self.rank} lost the rendezvous store, which the launcher or rank 0 holds ({reason})",
                outcome_unknown=decided,
            ) from error

    def _lead(self, phase: str, record: bytes, decide: Decide, timeout: float) -> bytes:
        requests: list[_Request] = []
        try:
            with self._reaching_store(phase):
                try:
                    self._await_requests(phase, timeout)
                finally:
                    requests += self._claim_all(timeout)
            self._check_requests(phase, requests)
            answer = decide([record, *(request.record for request in requests)])
        except BaseException as error:
            told = shared_error(phase, error)
            with suppress(StoreError):
                text = json.dumps([type(told).__name__, str(told)]).encode()
                self._answer(requests, b"-" + text, timeout)
            if told is error or not isinstance(error, Exception):
                raise
            raise told from error
        with self._reaching_store(phase, decided=True):
            self._answer(requests, b"+" + answer, timeout)
        return answer

    def _follow(self, phase: str, record: bytes, timeout: float) -> bytes:
        nonce = uuid.uuid4().hex
        header = json.dumps([nonce, phase]).encode()
        request = header + b"\n" + record
        with self._reaching_store(phase):
            self._line.ask([lambda: self._put(f"request/{self.rank}", request)], timeout)
        with self._reaching_store(phase, decided=True):
            try:
                self._await_answer(nonce, phase, request, timeout)
            except BaseException:
                self._withdraw_at_last(timeout)
                raise
            (answer,) = self._line.ask([lambda: self._get(f"answer/{nonce}")], timeout)
        with suppress(StoreError):
            self._line.ask([lambda: self._delete(f"answer/{nonce}")], timeout)
        if answer[:1] == b"+":
            return answer[1:]
        raise by_name(*json.loads(answer[1:]))

    def _await_requests(self, phase: str, timeout: float) -> None:
        ranks = range(1, self.world_size)
        watch = Watch(self._peek, timeout)
        keys = [self._at(f"request/{rank}") for rank in ranks]

        def look() -> tuple[str, str]:
            absent = [r for r in ranks if not self._has(f"request/{r}")]
            return watch.lost(absent), watch.awaited(absent)

        for pause in _pauses(self.world_size):
            if all(self._line.ask([lambda: self._store.check(keys)], timeout)):
                return
            if watch.is_due():
                lost, awaited = self._line.ask([look], timeout)[0]
                if lost:
                    raise lost_error(phase, lost)
                _tell_awaited(phase, awaited)
                self.beat()
            time.sleep(pause)

    def _await_answer(self, nonce: str, phase: str, request: bytes, timeout: float) -> None:
        watch = Watch(self._peek, timeout)

        def is_there() -> bool:
            return self._has(f"answer/{nonce}")

        def look() -> tuple[str, str]:
            return watch.lost([0]), watch.awaited([0])

        for pause in _pauses(self.world_size):
            if all(self._line.ask([is_there], timeout)):
                return
            is_due = watch.is_due()
            if (is_due or not self._session) and all(self._line.ask([self._join], timeout)):
                self._line.ask([lambda: self._put(f"request/{self.rank}", request)], timeout)
            elif is_due:
                # Rank 0 may have answered and left since the look above, so a lost rank 0 needs another look.
                lost, awaited = self._line.ask([look], timeout)[0]
                if lost and not all(self._line.ask([is_there], timeout)):
                    (withdrawn,) = self._line.ask([self._withdraw], timeout)
                    raise lost_error(phase, lost, outcome_unknown=not withdrawn)
                _tell_awaited(phase, awaited if self.rank == 1 else "")
            time.sleep(pause)

    def _claim_all(self, patience: float) -> list[_Request]:
        """The requests of all ranks that have left one."""
        claims = [partial(self._claim, rank) for rank in range(1, self.world_size)]
        return list(filter(None, self._line.ask(claims, patience)))

    def _claim(self, rank: int) -> _Request | None:
        """A rank's request, which it cannot withdraw any more; None when there is none."""
        key = f"request/{rank}"
        request = self._peek(key)
        if request is None:
            return None
        header, _, record = request.partition(b"\n")
        nonce, phase = json.loads(header)
        return _Request(rank, nonce, phase, record) if self._delete(key) else None

    def _withdraw(self) -> bool:
        """Whether this rank's request was still there, so that rank 0 will never decide on it."""
        return not self._session or self._delete(f"request/{self.rank}")

    def _withdraw_at_last(self, patience: float) -> None:
        """Withdraw now; from a store that does not answer, as the first thing when it answers again."""
        try:
            self._line.ask([self._withdraw], patience)
        except StoreError:
            self._line.tell(self._withdraw)

    def _check_requests(self, phase: str, requests: Sequence[_Request]) -> None:
        for request in requests:
            if request.phase != phase:
                raise DisagreementError(
                    f"rank {request.rank} is in '{request.phase}' while rank 0 is in '{phase}': every rank must make "
                    f"the same calls in the same order. {consequence(phase)}"
                )
        if len(requests) < self.world_size - 1:
            gone = set(range(1, self.world_size)) - {request.rank for request in requests}
            raise lost_error(phase, f"{name_ranks(sorted(gone))} gave up waiting for rank 0")

    def _answer(self, requests: Iterable[_Request], answer: bytes, patience: float) -> None:
        puts = [partial(self._put, f"answer/{request.nonce}", answer) for request in requests]
        self._line.ask(puts, patience)

    def _join(self) -> bool:
        """Whether this rank is in another session than before: nothing that it has left elsewhere is looked at."""
        is_first = self.rank == 0
        session = opened_session(self._store) if is_first else session_to_join(self._look_up)
        if is_new := session not in ("", self._session):
            self._session = session
            self._put(f"who/{self.rank}", json.dumps(identity()).encode())
        return is_new

    def _delete(self, key: str) -> bool:
        """Whether the key was there."""
        return bool(self._store.delete_key(self._at(key)))

    def _at(self, key: str) -> str:
        """The key in the store. `who/<rank>` is shared by all names: a rank may die before it meets under this one."""
        place = key if key.startswith("who/") else f"{self._name}/{key}"
        return f"zero_ckpt/{self._session}/{place}"

    def _put(self, key: str, value: bytes) -> None:
        if self._session:
            self._store.set(self._at(key), value)

    def _has(self, key: str) -> bool:
        return bool(self._store.check([self._at(key)]))

    def _get(self, key: str) -> bytes:
        return bytes(self._store.get(self._at(key)))

    def _peek(self, key: str) -> bytes | None:
        """A key's value if it is there. `get` would wait for one that is withdrawn at this moment."""
        return self._look_up(self._at(key))

    def _look_up(self, path: str) -> bytes | None:
        found = bytes(self._store.compare_set(path, _ABSENT, _ABSENT))
        return None if found == _ABSENT.encode() else found


def _tell_awaited(phase: str, text: str) -> None:
    if text:
        _logger.warning("%s: %s. Every rank must make this call.", phase, text)


def longest_pause(world_size: int) -> float:
    """Seconds between two looks of a rank that waits long: 20 ms, and for large jobs what the store can bear."""
    return max(0.02, world_size / _LOOKS_PER_SECOND)


def _pauses(world_size: int) -> Iterable[float]:
    """Short at first, since ranks mostly arrive together."""
    longest = longest_pause(world_size)
    pause = longest / 100 if longest == 0.02 else longest / 10
    while True:
        yield pause
        pause = min(pause * 1.3, longest)
