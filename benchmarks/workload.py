"""The state that is saved and loaded: a large sharded model with Adam state, or many small tensors.

Nothing is trained: weights and optimizer state are filled with values that follow from the tensor's
name and the element's place in the global tensor, so any rank of any world size can tell whether
what was loaded is what was saved.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from benchmarks.ranks import Rank

SMALL_ELEMENTS = 1024  # fp32 elements of one small tensor on one rank: 4 KiB
MASK = (1 << 24) - 1  # fp32 holds every integer up to it exactly
PIECE = 1 << 22  # elements that are filled or compared at a time


class Block(nn.Module):
    """The parameters of a transformer block. It is never run: a checkpoint sees only tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)


class Model(nn.Module):
    """A decoder's parameters, about `params` in number (250M: width 1024, 17 blocks)."""

    def __init__(self, params: int) -> None:
        super().__init__()
        layers = 17 if params >= 50_000_000 else 2
        width = 16 * max(1, round(math.sqrt(params / (12 * layers + 32)) / 16))
        vocabulary = 32 * width
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)


def build_large(rank: Rank) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model sharded over all ranks (FSDP2, ZeRO stage 2), with Adam state; not yet filled."""
    mesh = init_device_mesh("cpu", (rank.world_size,))
    with torch.device("meta"):
        model = Model(rank.options.params)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.empty_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.empty_like(parameter, requires_grad=False),
        }
    return model, optimizer


def build_small(rank: Rank) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`small_tensors` parameters of 4 KiB on every rank (dimension 0), no optimizer state."""
    mesh = init_device_mesh("cpu", (rank.world_size,))
    model = nn.Module()
    model.small = nn.ParameterList(
        DTensor.from_local(torch.empty(SMALL_ELEMENTS), mesh, [Shard(0)], run_check=False)
        for _ in range(rank.options.small_tensors)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return model, optimizer


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every live tensor of the state by a flat name. A load may replace those of the optimizer."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            named[f"{name}/{key}"] = value
    return named


def local_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(name, this rank's part, the global index of its first element) of every tensor."""
    for name, tensor in tensors(model, optimizer).items():
        if isinstance(tensor, DTensor):
            rows, parts = tensor.shape[0], tensor.device_mesh.size()
            first_row = min(rows, tensor.device_mesh.get_local_rank() * -(-rows // parts))
            yield name, tensor.to_local(), first_row * (tensor.numel() // max(1, rows))
        else:
            yield name, tensor, 0


def fill(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, part, start in local_tensors(model, optimizer):
        for piece, values in _pieces(name, part, start):
            piece.copy_(values)


def wipe(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Zeroes the state before a load, which also brings its memory into place."""
    for _, part, _ in local_tensors(model, optimizer):
        part.zero_()


def check(model: nn.Module, optimizer: torch.optim.Optimizer, loader: str) -> None:
    """Raises RuntimeError when any element differs from what `fill` put there."""
    for name, part, start in local_tensors(model, optimizer):
        for piece, values in _pieces(name, part, start):
            if not torch.equal(piece, values):
                raise RuntimeError(f"{loader}: {name} is not what was saved")


def check_export(file: Path) -> None:
    """Raises RuntimeError when a tensor of a safetensors file is not the large model's, in full."""
    with safe_open(file, framework="pt") as exported:
        for name in exported.keys():  # noqa: SIM118 - safe_open is no mapping
            for piece, values in _pieces(name, exported.get_tensor(name), 0):
                if not torch.equal(piece, values):
                    raise RuntimeError(f"{file}: {name} is not what was saved")


def _pieces(
    name: str, part: torch.Tensor, start: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    flat = part.view(-1)
    seed = zlib.crc32(name.encode())
    for begin in range(0, flat.numel(), PIECE):
        piece = flat[begin : begin + PIECE]
        first = seed + start + begin
        yield piece, (torch.arange(first, first + piece.numel()) & MASK).to(piece.dtype)
