"""Agreements before a save or a load: outcomes, errors, and patience."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.workers import run_ranks
from zero_ckpt.accelerate.meeting import together
from zero_ckpt.core.control import LocalControl, control_for_process_group
from zero_ckpt.errors import ConfigurationError, ZeroCkptError


class Watched(LocalControl):
    """One of two ranks, as far as it is asked."""

    world_size = 2

    def __init__(self) -> None:
        self.beaten = threading.Event()

    def beat(self) -> None:
        self.beaten.set()


def test_a_rank_that_is_busy_says_that_it_is_alive() -> None:
    control = Watched()
    assert together(control, "busy", lambda: control.beaten.wait(60), lambda told: told, None) == [
        True
    ]
    assert not [t for t in threading.enumerate() if t.name == "zero_ckpt-alive"]


def test_all_ranks_get_what_rank_0_makes_of_all_results() -> None:
    assert run_ranks(collected, 3) == [[0, 10, 20]] * 3


def collected() -> Any:
    control = control_for_process_group()
    return together(control, "collect", lambda: 10 * control.rank, lambda told: told, 30)


def test_errors_reach_every_rank() -> None:
    run_ranks(errors, 2)


def errors() -> None:
    control = control_for_process_group()

    def refuse(told: list[Any]) -> Any:
        raise ConfigurationError("not so")

    with pytest.raises(ConfigurationError, match="not so"):
        together(control, "refuse", lambda: None, refuse, 30)

    def fail() -> None:
        if control.rank == 1:
            raise KeyError("lost")

    expected: Any = KeyError if control.rank == 1 else ZeroCkptError
    with pytest.raises(expected, match="lost" if control.rank else "rank 1: KeyError: 'lost'"):
        together(control, "fail", fail, lambda told: told, 30)
