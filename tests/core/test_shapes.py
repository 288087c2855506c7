"""Values that were stored are told apart from what somebody relies on, wherever they differ."""

from __future__ import annotations

from types import NoneType
from typing import Any

import pytest
import torch

from zero_ckpt.core import rng
from zero_ckpt.core.shapes import Shape, misfit

SHAPE: Shape = {
    "count": int,
    "place": (int, NoneType),
    "sums": {str: float},
    "parts": [lambda part: {"n": int} if part else dict],
}
GOOD: dict[str, Any] = {
    "count": 1,
    "place": None,
    "sums": {"a": 0.5},
    "parts": [{"n": 1}, {}],
    "more": object(),
}


def test_what_fits_may_hold_more() -> None:
    assert misfit(GOOD, SHAPE, "it") == ""
    assert misfit({**GOOD, "place": 3, "sums": {}, "parts": []}, SHAPE, "it") == ""


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"count": True}, "it/count: int expected, bool found"),
        ({"place": "3"}, "it/place: int or NoneType expected, str found"),
        ({"sums": [0.5]}, "it/sums: a dict expected, list found"),
        ({"sums": {"a": 0.5, "b": None}}, "it/sums/b: float expected, NoneType found"),
        ({"parts": {}}, "it/parts: a list expected, dict found"),
        ({"parts": [{"n": 1}, {"m": 1}]}, "it/parts[1]/n: missing"),
        ({"parts": [[]]}, "it/parts[0]: dict expected, list found"),
    ],
)
def test_what_does_not_fit_is_named(wrong: dict[str, Any], told: str) -> None:
    assert misfit({**GOOD, **wrong}, SHAPE, "it") == told


@pytest.mark.parametrize("value", [None, 7, [], {}, {"torch": 1}, {"torch": torch.zeros(3)}])
def test_generators_are_tried_without_a_draw(value: Any) -> None:
    before = torch.get_rng_state()
    assert misfit(value, rng.check, "rng").startswith("rng: ")
    for name in ("python", "numpy", "cuda"):
        broken = {**rng.capture(), name: value}
        assert misfit(broken, rng.check, "rng").startswith("rng: ")
    assert misfit(rng.capture(), rng.check, "rng") == ""
    assert torch.equal(before, torch.get_rng_state())
