"""Who counts as lost: judged by what ranks filed, on a clock that the test turns."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from zero_ckpt.core.watch import Watch, identity, name_ranks


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with patch("zero_ckpt.core.watch.time.monotonic", clock):
        yield clock


FILED: dict[str, bytes] = {}


def watch(timeout: float = 10.0) -> Watch:
    FILED.clear()
    return Watch(FILED.get, timeout)


def test_a_silent_rank_is_lost_after_the_timeout_and_not_before(clock: Clock) -> None:
    found = watch()
    for _ in range(10):
        assert found.lost([1, 2]) == ""
        clock.now += 1
    assert found.lost([1, 2]) == ""
    clock.now += 0.1
    assert found.lost([1, 2]) == "ranks 1, 2 did not arrive or make progress for 10 s"


def test_a_rank_that_makes_progress_is_never_lost(clock: Clock) -> None:
    found = watch()
    for beat in range(100):
        FILED["beat/1"] = str(beat).encode()
        clock.now += 9
        assert found.lost([1]) == ""
    clock.now += 11
    assert "rank 1 did not arrive" in found.lost([1])


def test_a_rank_that_is_looked_at_late_has_the_whole_timeout(clock: Clock) -> None:
    found = watch()
    clock.now += 8
    assert found.lost([1]) == ""
    FILED["beat/1"] = b"1"
    clock.now += 8
    assert found.lost([1]) == ""


def test_who_is_waited_for_is_told_once_and_early(clock: Clock) -> None:
    found = watch(300.0)
    assert (found.lost([1, 2]), found.awaited([1, 2])) == ("", "")
    clock.now += 30
    FILED["beat/2"] = b"1"
    assert (found.lost([1, 2]), found.awaited([1, 2])) == ("", "")
    clock.now += 1
    assert found.lost([1, 2]) == ""
    said = "rank 1 did not arrive or make progress for 30 s; after 300 s that is an error"
    assert found.awaited([1, 2]) == said
    clock.now += 60
    assert (found.lost([1, 2]), found.awaited([1, 2])) == ("", "")


def test_it_looks_once_a_second_and_oftener_for_short_timeouts(clock: Clock) -> None:
    for timeout, interval in ((300.0, 1.0), (0.4, 0.1)):
        found = watch(timeout)
        assert not found.is_due()
        clock.now += interval + 1e-6
        assert found.is_due()
        assert not found.is_due()


def ended_child() -> subprocess.Popen[bytes]:
    """A process that has ended, and waits to be reaped."""
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child


def test_a_process_of_this_host_that_is_gone_is_dead_at_once() -> None:
    """Even while it is only waiting to be reaped; one of another host cannot be judged."""
    found, me, child = watch(), identity(), ended_child()
    FILED["who/1"] = json.dumps(me).encode()
    assert found.lost([1]) == ""
    FILED["who/1"] = json.dumps([*me[:2], child.pid, me[3]]).encode()
    assert found.lost([1]) == "rank 1 died"
    child.wait()
    assert found.lost([1]) == "rank 1 died"
    FILED["who/1"] = json.dumps(["another host", *me[1:2], child.pid, me[3]]).encode()
    assert found.lost([1]) == ""
    FILED["who/1"] = json.dumps([*me[:3], "started at another time"]).encode()
    assert found.lost([1]) == "rank 1 died"


def test_ranks_are_named_in_few_words() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([1, 2]) == "ranks 1, 2"
    assert name_ranks(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 ..."
