"""Lightning's tests that pass with its own strategies and must differ with `ZeroStrategy`, and why.

An id without brackets stands for all parameters of that test.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KNOWN", "Difference", "difference_of"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One reason, and the tests that it explains."""

    reason: str
    tests: tuple[str, ...]


KNOWN: tuple[Difference, ...] = ()


def difference_of(test: str) -> Difference | None:
    """Why `test` may fail; None: it may not."""
    names = {test, test.partition("[")[0]}
    return next((each for each in KNOWN if names & set(each.tests)), None)
