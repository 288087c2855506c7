"""For every test: GPU tests need a GPU, and no rank outlives the test that started it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.workers import kill_forgotten


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _no_rank_is_forgotten() -> Iterator[None]:
    yield
    assert kill_forgotten() == 0, "started ranks must be waited for: Ranks.wait(), or `with`"
