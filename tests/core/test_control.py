"""The control plane over real stores, one thread a rank: one answer or error for all, and no waiting for ever."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from zero_ckpt.core import session
from zero_ckpt.core.control import Decide, LocalControl, control_for_process_group
from zero_ckpt.core.store_control import StoreControl, longest_pause
from zero_ckpt.core.watch import identity
from zero_ckpt.errors import (
    ConfigurationError,
    DisagreementError,
    RankTimeoutError,
    SaveError,
    ZeroCkptError,
)

RANKS = 3
LONG, SHORT = 60.0, 0.4
"""Seconds: never reached in a passing test; soon reached where silence is what is tested."""

Stores = Callable[[], list[Any]]


@pytest.fixture(params=["hash", "tcp"])
def stores(request: pytest.FixtureRequest) -> list[Any]:
    """One connection for each rank."""
    if request.param == "hash":
        return [dist.HashStore()] * RANKS
    timeout = timedelta(seconds=20)
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    others = [dist.TCPStore("127.0.0.1", first.port, timeout=timeout) for _ in range(1, RANKS)]
    return [first, *others]


def controls(stores: list[Any]) -> list[StoreControl]:
    return [StoreControl(store, rank, RANKS) for rank, store in enumerate(stores)]


def join(records: list[bytes]) -> bytes:
    return b"+".join(records)


def meet(
    planes: list[StoreControl],
    phases: list[str] | str = "save: agree",
    decide: Decide = join,
    timeout: float = LONG,
    absent: tuple[int, ...] = (),
) -> list[Any]:
    """What `meet` gives to each rank: its answer, or its error."""

    def call(plane: StoreControl) -> Any:
        if plane.rank in absent:
            return None
        phase = phases if isinstance(phases, str) else phases[plane.rank]
        try:
            return plane.meet(phase, f"r{plane.rank}".encode(), decide, timeout)
        except ZeroCkptError as error:
            return error

    with ThreadPoolExecutor(len(planes)) as pool:
        return list(pool.map(call, planes))


def assert_same_error(found: list[Any], kind: type[ZeroCkptError], *parts: str) -> None:
    assert {type(error) for error in found} == {kind}
    assert len({str(error) for error in found}) == 1
    for part in parts:
        assert part in str(found[0])


def test_every_rank_gets_the_answer_of_rank_0_however_often_they_meet(stores: list[Any]) -> None:
    planes = controls(stores)
    for phase in ("save: agree", "save: vote", "save: agree"):
        assert meet(planes, phase) == [b"r0+r1+r2"] * RANKS


@pytest.mark.parametrize(("absent", "named"), [((2,), "rank 2"), ((0,), "rank 0")])
def test_the_first_rank_that_waits_says_for_whom(
    absent: tuple[int, ...],
    named: str,
    stores: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A save on some ranks only is so understood before the timeout."""
    monkeypatch.setattr("zero_ckpt.core.watch.PATIENCE", SHORT / 8)
    meet(controls(stores), timeout=SHORT, absent=absent)
    told = [record.getMessage() for record in caplog.records if record.name == "zero_ckpt"]
    said = f"save: agree: {named} did not arrive or make progress for 0.05 s; after 0.4 s that is an error."
    assert told.count(f"{said} Every rank must make this call.") == 1


def test_answers_may_be_empty_or_any_bytes(stores: list[Any]) -> None:
    planes = controls(stores)
    for answer in (b"", bytes(range(256)), b"-\n+", b"x" * 1_000_000):
        assert meet(planes, decide=lambda _, a=answer: a) == [answer] * RANKS  # type: ignore[misc]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DisagreementError("tags differ"), DisagreementError),
        (ConfigurationError("tags differ"), ConfigurationError),
        (SaveError("tags differ"), SaveError),
        (OSError(28, "tags differ", "/dir"), SaveError),
        (RuntimeError("tags differ"), SaveError),
        (KeyError("tags differ"), SaveError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_an_error_of_rank_0_is_the_same_on_all(
    error: Exception, kind: type[ZeroCkptError], stores: list[Any]
) -> None:
    planes = controls(stores)

    def decide(_: list[bytes]) -> bytes:
        raise error

    assert_same_error(meet(planes, decide=decide), kind, "tags differ")
    assert meet(planes) == [b"r0+r1+r2"] * RANKS, "and the next meeting works"


def test_a_missing_rank_is_named_and_the_next_meeting_works(stores: list[Any]) -> None:
    planes = controls(stores)
    found = meet(planes, timeout=SHORT, absent=(2,))
    assert found[2] is None
    assert all(isinstance(error, RankTimeoutError) for error in found[:2])
    # A follower that runs out of patience at the same moment is named beside it.
    assert re.search(r"2 did not arrive or make progress for 0\.4 s", str(found[0]))
    assert "Nothing was committed" in str(found[0])
    assert meet(planes) == [b"r0+r1+r2"] * RANKS


def test_a_missing_rank_0_is_named_and_the_next_meeting_works(stores: list[Any]) -> None:
    planes = controls(stores)
    found = meet(planes, timeout=SHORT, absent=(0,))
    for error in found[1:]:
        assert isinstance(error, RankTimeoutError)
        assert "rank 0 did not arrive" in str(error)
        assert not error.outcome_unknown
    assert meet(planes) == [b"r0+r1+r2"] * RANKS


def test_ranks_in_different_calls_are_told_so(stores: list[Any]) -> None:
    planes = controls(stores)
    found = meet(planes, ["save: agree", "save: agree", "load: open"])
    assert_same_error(found, DisagreementError, "rank 2 is in 'load: open'", "'save: agree'")
    assert meet(planes) == [b"r0+r1+r2"] * RANKS


def test_a_dead_rank_is_named_at_once(stores: list[Any]) -> None:
    """Its process is gone from this host: nobody waits for the time limit, not even where it never met under a name."""
    planes = controls(stores)
    others = [StoreControl(store, rank, RANKS, "other") for rank, store in enumerate(stores[:2])]
    child = subprocess.Popen(["true"])
    child.wait()
    who = identity()
    who[2] = child.pid
    stores[0].set(planes[0]._at("who/2"), json.dumps(who).encode())
    found = meet(planes, timeout=LONG, absent=(2,))
    found += meet([*others, planes[2]], timeout=LONG, absent=(2,))[:2]
    assert all("rank 2 died" in str(error) for error in [*found[:2], *found[-2:]])


@pytest.mark.parametrize("host", ["this host", "another host"])
@pytest.mark.parametrize("first", [0, 1], ids=["rank 0 comes first", "rank 0 comes last"])
def test_what_an_earlier_launch_left_in_the_store_is_not_taken_for_this_one(
    host: str, first: int, stores: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An elastic agent gives its store to the ranks that it starts after others were killed in a meeting."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with subprocess.Popen(["true"]) as child:
        pass
    dead = identity()
    dead[2] = child.pid
    if host != "this host":
        dead[0] = "its boot id"
    for plane in controls(stores):
        plane._put(f"who/{plane.rank}", json.dumps(dead).encode())
        plane._put(f"request/{plane.rank}", b'["nonce", "save: agree"]\nof a rank that was killed')
    stores[0].set(session.SESSION_KEY, json.dumps([plane._session, dead]).encode())
    session._own_name.cache_clear()

    ranks = [*range(first, RANKS), *range(first)]
    planes = sorted((StoreControl(stores[r], r, RANKS) for r in ranks), key=lambda p: p.rank)
    assert meet(planes) == [b"r0+r1+r2"] * RANKS
    (error, *_) = meet(planes, timeout=SHORT, absent=(2,))
    assert "2 did not arrive" in str(error), "and not that it died, as its predecessor has"


def test_a_lost_store_is_a_rank_timeout(stores: list[Any]) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise dist.DistNetworkError("connection reset\nby peer")

    planes = controls(stores)
    planes[1]._store = Gone()
    with pytest.raises(
        RankTimeoutError, match=r"rank 1 lost the rendezvous store.*connection reset"
    ):
        planes[1].meet("save: agree", b"", join, LONG)
    planes[1].beat()  # never raises


def test_an_error_of_a_signal_handler_is_not_the_stores(
    stores: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's handler of SIGTERM makes a collective, which fails when another rank is gone."""

    def handler(seconds: float) -> None:
        raise RuntimeError("Connection closed by peer")

    (first, *_) = controls(stores)
    monkeypatch.setattr("zero_ckpt.core.store_control.time.sleep", handler)
    with pytest.raises(
        ZeroCkptError, match=r"^load: open: rank 0: RuntimeError: Connection closed by peer\."
    ):
        first.meet("load: open", b"", join, LONG)


def test_two_control_planes_share_a_store_without_meeting(stores: list[Any]) -> None:
    main = controls(stores)
    other = [StoreControl(store, rank, RANKS, "other") for rank, store in enumerate(stores)]
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(meet, planes) for planes in (main, other)]
        assert [future.result() for future in found] == [[b"r0+r1+r2"] * RANKS] * 2


def test_nothing_is_left_in_the_store(stores: list[Any]) -> None:
    planes = controls(stores)
    meet(planes)  # now the store has what each rank said when it came: a set is not answered
    before = stores[0].num_keys()
    for _ in range(3):
        meet(planes)
    assert stores[0].num_keys() == before


def test_the_ranks_of_a_large_job_do_not_crowd_the_store() -> None:
    """A store answers some 50,000 calls a second, and rank 0's must not queue behind the others' looks."""
    assert longest_pause(8) == 0.02
    assert all(ranks / longest_pause(ranks) <= 20_000 for ranks in (512, 4096, 16_384))


def test_one_process_agrees_with_itself() -> None:
    plane = control_for_process_group()
    assert isinstance(plane, LocalControl)
    assert plane.meet("save: agree", b"a", join, LONG) == b"a"
    plane.beat()

    def fail(_: list[bytes]) -> bytes:
        raise PermissionError(13, "not allowed", "/dir")

    with pytest.raises(SaveError, match=r"/dir: not allowed.*Nothing was committed"):
        plane.meet("save: agree", b"", fail, LONG)
