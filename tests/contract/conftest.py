"""Checkpoints of other systems, for the tests of all doors."""

from __future__ import annotations

from tests.interop.conftest import deepspeed_cases

__all__ = ["deepspeed_cases"]
