"""Pauses Python's cyclic garbage collector while many small records are made.

A plan of 20,000 tensors makes a million objects and no cycles; each full collection meanwhile walks all of torch's
objects again, which costs more than the planning.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collection is off inside, and afterwards what it was before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
