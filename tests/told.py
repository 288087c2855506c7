"""Warnings: what a call tells, and that a job tells it once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["told_once", "warned"]


def warned(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, list[str]]:
    """What `call` returns, and the texts of the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call(*args, **options)
    return value, [str(warning.message) for warning in caught]


def told_once(by_rank: list[list[str]]) -> list[str]:
    """The warnings of a job: rank 0 tells them, the others do not repeat them."""
    assert not any(by_rank[1:]), by_rank
    return by_rank[0]
