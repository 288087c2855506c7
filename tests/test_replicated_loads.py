"""Loads of state that every rank holds whole: verified in shares, each rank reading a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.workers import run_ranks
from zero_ckpt import Checkpointer
from zero_ckpt.core.shard_file import BLOCK
from zero_ckpt.core.shard_reader import ShardReader
from zero_ckpt.errors import CorruptShardError

BLOCKS = 5


def model(fill: float) -> nn.Module:
    """Of `BLOCKS` blocks and a bit, the same on every rank."""
    made = nn.Linear(BLOCK // 4, BLOCKS)
    with torch.no_grad():
        made.weight.copy_(torch.arange(BLOCKS)[:, None].expand_as(made.weight) + fill)
        made.bias.fill_(fill)
    return made


def save(directory: Path) -> None:
    Checkpointer(model(1.0)).save_checkpoint(directory, tag="a")


def _blocks_read(directory: Path) -> tuple[list[tuple[str, int]], bool]:
    """The blocks that this rank reads in a load, and whether it loaded what was saved."""
    seen: list[tuple[str, int]] = []

    def watched(read: Callable[..., Any]) -> Callable[..., Any]:
        def noting(self: ShardReader, index: int, *rest: Any) -> Any:
            seen.append((Path(self.name).name, index))
            return read(self, index, *rest)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "fetch", watched(ShardReader.fetch))
        live = model(0.0)
        Checkpointer(live, rng=False).load_checkpoint(directory, tag="a")
    expected = model(1.0).state_dict()
    same = all(torch.equal(value, expected[name]) for name, value in live.state_dict().items())
    return [(name, index) for name, index in seen if name.startswith("model")], same


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_block_is_verified_once_by_some_rank_and_then_read_by_all(
    tmp_path: Path, world_size: int
) -> None:
    run_ranks(save, 2, tmp_path)
    results = run_ranks(_blocks_read, world_size, tmp_path)
    assert all(same for _, same in results)
    everything = {block for seen, _ in results for block in seen}
    assert len(everything) > BLOCKS
    for block in everything:
        times = [seen.count(block) for seen, _ in results]
        assert sum(times) == world_size + 1  # once before anything changes, once into each rank
        assert min(times) >= 1


def _load_damaged(directory: Path, file: str, at: int) -> tuple[str, bool]:
    live = model(0.0)
    checkpointer = Checkpointer(live)
    if dist.get_rank() == 0:
        path = directory / "a" / file
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    dist.barrier()
    with pytest.raises(CorruptShardError) as raised:
        checkpointer.load_checkpoint(directory, tag="a")
    before = model(0.0).state_dict()
    kept = all(torch.equal(value, before[name]) for name, value in live.state_dict().items())
    return str(raised.value), kept


@pytest.mark.parametrize("block", range(3))
def test_damage_that_one_rank_finds_changes_nothing_on_any(tmp_path: Path, block: int) -> None:
    run_ranks(save, 2, tmp_path)
    file = "model-00000-of-00002.safetensors"
    at = 4096 + block * BLOCK + 17
    (text, kept), (other, also_kept) = run_ranks(_load_damaged, 2, tmp_path, file, at)
    assert text == other
    assert f"{file}: block {block} " in text
    assert kept
    assert also_kept
