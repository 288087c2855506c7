"""Client states and random number generators: what a checkpoint holds beside tensors. In one process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.small import (
    same,
)
from zero_ckpt import (
    Checkpointer,
    load_checkpoint,
    save_checkpoint,
)
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.core.shard_reader import ShardReader


def draws() -> list[Any]:
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)]


def test_random_numbers_continue(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves one that is half used
    np.random.standard_normal()
    save_checkpoint(tmp_path, nn.Linear(1, 1), step=1)
    expected = draws()
    draws()
    load_checkpoint(tmp_path, nn.Linear(1, 1))
    assert draws() == expected
    with Checkpointer(nn.Linear(1, 1), rng=False) as checkpointer:
        checkpointer.load_checkpoint(tmp_path)
    assert draws() != expected


def test_client_state_of_every_shape(tmp_path: Path) -> None:
    for tag, state in enumerate([None, 3, [1, (2,)], {"t": torch.ones(2), 5: {1.5: None}}, {}]):
        save_checkpoint(tmp_path, nn.Linear(1, 1), tag=tag, step=1, client_state=state)
        assert same(load_checkpoint(tmp_path, nn.Linear(1, 1), tag=tag)[1], state)


def test_many_small_tensors_in_the_client_state_are_read_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"k{i}": torch.full((3,), float(i)) for i in range(500)}
    save_checkpoint(tmp_path, nn.Linear(1, 1), step=1, client_state=state)
    blocks: list[int] = []
    real = ShardReader.fetch

    def fetch(self: ShardReader, index: int, *args: Any) -> memoryview | None:
        blocks.append(index)
        return real(self, index, *args)

    monkeypatch.setattr(ShardReader, "fetch", fetch)
    _, found = load_checkpoint(tmp_path, nn.Linear(1, 1))
    assert same(found, state)
    assert 0 < len(blocks) < 10


def test_lazy_client_state_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, nn.Linear(1, 1), tag="a", step=1)
    lazy = open_checkpoint(tmp_path).lazy("model", "weight")
    save_checkpoint(tmp_path, nn.Linear(1, 1), tag="b", step=1, client_state=[lazy])
    _, found = load_checkpoint(tmp_path, nn.Linear(1, 1), tag="b")
    assert type(found[0]) is torch.Tensor
    assert torch.equal(found[0], lazy.materialize())
