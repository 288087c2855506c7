"""For every test: GPU tests need a GPU, no process outlives the test that started it, and the session ends."""

from __future__ import annotations

import faulthandler
import multiprocessing
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.workers import kill_forgotten

_END_SECONDS = 60.0
"""For what runs when Python ends: threads and children are waited for, without limit."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    faulthandler.dump_traceback_later(_END_SECONDS, exit=True, file=sys.__stderr__)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    yield
    assert kill_forgotten() == 0, "started ranks must be waited for: Ranks.wait(), or `with`"
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
        child.join()
    grouped = dist.is_initialized()
    if grouped:
        dist.destroy_process_group()
    assert not grouped, (
        "the test left a process group in this process, which all later ones would find"
    )
    assert not children, f"processes which the test started still ran: {children}"
