"""On a CUDA device: staged into pinned memory on a stream of its own, and equal to a save that stops the training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from zero_ckpt import AsyncSave, Checkpointer, zero
from zero_ckpt.core.checkpoint import open_checkpoint

pytestmark = pytest.mark.gpu

WIDTH = 1024


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """A world of one process, as one rank of a large job sees it."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(stage: int = 0, *, cpu_offload: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    model: nn.Module = nn.Sequential(*layers, nn.BatchNorm1d(WIDTH))
    if stage >= 2:
        mesh = zero.make_mesh(1, None, "cuda")
        zero.shard_module(model, stage=stage, mesh=mesh, cpu_offload=cpu_offload)
    if not cpu_offload:
        model.cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.float16, enabled=scaler is not None):
        loss = model(torch.ones(8, WIDTH, device="cuda")).float().pow(2).mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stored(path: str) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {
            f"{role}/{key}": checkpoint.tensor(role, key)
            for role in ("model", "optim")
            for key in checkpoint.keys(role)
        }


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("stage", "cpu_offload"), [(0, False), (2, False), (3, False), (3, True)])
def test_it_equals_a_save_that_stops_the_training(
    nccl: None, tmp_path: Path, stage: int, cpu_offload: bool, scaled: bool
) -> None:
    model, optimizer = build(stage, cpu_offload=cpu_offload)
    scaler = torch.amp.GradScaler("cuda") if scaled and not cpu_offload else None
    step(model, optimizer, scaler)
    sync = Checkpointer(model, optimizer)
    decoupled = Checkpointer(model, optimizer, engine=AsyncSave(check_staging=not cpu_offload))
    for round_ in range(3):
        sync.save_checkpoint(tmp_path / "sync", tag="a")
        handle = decoupled.save_checkpoint(tmp_path / "async", tag="a")
        for _ in range(2):
            step(model, optimizer, scaler)  # queued kernels may still run when the copy begins
        handle.wait()
        expected, found = stored(str(tmp_path / "sync")), stored(str(tmp_path / "async"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), round_
    decoupled.close()


def test_staging_memory_is_pinned(nccl: None, tmp_path: Path) -> None:
    model, optimizer = build()
    step(model, optimizer)
    with Checkpointer(model, optimizer, engine="async") as checkpointer:
        checkpointer.save_checkpoint(tmp_path, tag="a").wait()
        pool = checkpointer._engine._pool
        assert pool is not None
        buffer = pool.take()
        assert torch.frombuffer(buffer, dtype=torch.uint8).is_pinned()
        pool.give(buffer)


def test_a_load_fills_tensors_on_the_device(nccl: None, tmp_path: Path) -> None:
    model, optimizer = build(3)
    step(model, optimizer)
    with Checkpointer(model, optimizer, engine="async") as checkpointer:
        checkpointer.save_checkpoint(tmp_path, tag="a")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        step(model, optimizer)
        checkpointer.load_checkpoint(tmp_path)
        after = model.state_dict()
    assert all(torch.equal(local(before[name]), local(after[name])) for name in before)
