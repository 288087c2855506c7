"""Calls to a store that may never answer: given up on in time, and in order when it answers again."""

from __future__ import annotations

import gc
import threading

import pytest

from zero_ckpt.core.line import Line

LONG, SHORT = 60.0, 0.2


def test_calls_return_in_order() -> None:
    assert Line().ask((lambda n=n: n * n for n in range(4)), LONG) == [0, 1, 4, 9]


def test_an_error_ends_the_calls_and_is_raised_and_the_next_calls_work() -> None:
    line, made = Line(), []

    def fail() -> None:
        raise RuntimeError("connection reset")

    with pytest.raises(RuntimeError, match="connection reset"):
        line.ask([lambda: made.append(1), fail, lambda: made.append(2)], LONG)
    assert line.ask([lambda: 3], LONG) == [3]
    assert made == [1]


def test_what_is_not_answered_is_given_up_and_what_was_to_follow_is_never_called() -> None:
    line, answer, made = Line(), threading.Event(), []
    with pytest.raises(RuntimeError, match=r"it has not answered for 0\.2 s"):
        line.ask([answer.wait, lambda: made.append("follows")], SHORT)
    with pytest.raises(RuntimeError, match="it still does not answer"):
        line.ask([lambda: made.append("asked meanwhile")], LONG)
    line.tell(lambda: made.append("told meanwhile"))
    answer.set()
    while True:  # until it has noticed
        try:
            line.ask([lambda: made.append("asked at last")], LONG)
            break
        except RuntimeError:
            continue
    assert made == ["told meanwhile", "asked at last"]


def test_many_answers_may_take_longer_than_one() -> None:
    """A large job's rank 0 makes thousands of calls at once: only silence counts."""
    pause = threading.Event()
    assert Line().ask([lambda: pause.wait(0.1)] * 6, 0.4) == [False] * 6


def test_the_thread_ends_with_its_line() -> None:
    line = Line()
    (thread,) = line.ask([threading.current_thread], LONG)
    assert thread.is_alive()
    del line
    gc.collect()
    assert not thread.is_alive()
