"""A mixture of experts in plain PyTorch: each rank holds some of a layer's experts, tokens travel.

Nothing here knows of checkpoints. Each byte goes to the one expert that the gate likes best; a real
model would add a loss that keeps the experts equally busy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the model's other parts are shared

from shared.gpt import GPT


def moe_gpt(experts: int, mesh: DeviceMesh | None = None, width: int = 64, depth: int = 2) -> GPT:
    """The examples' GPT with a mixture of experts in each block.

    `mesh`: the ranks over which the experts are spread, in one dimension; None: all are here.
    """
    torch.manual_seed(0)
    gpt = GPT(width, depth)
    for block in gpt.blocks:
        block.mlp = Mixture(width, experts, mesh)
    return gpt


class Mixture(nn.Module):
    """(..., width) to the same shape, through the best expert for each token, wherever it lives."""

    def __init__(self, width: int, experts: int, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.group = None if mesh is None else mesh.get_group()
        self.ranks = 1 if mesh is None else mesh.size()
        if experts % self.ranks:
            raise ValueError(f"{experts} experts cannot be shared evenly by {self.ranks} ranks")
        self.local = experts // self.ranks
        first = 0 if mesh is None else mesh.get_local_rank() * self.local
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(expert(width, first + i) for i in range(self.local))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        weight, choice = self.gate(tokens).softmax(-1).max(-1)
        order = choice.argsort(stable=True)  # by expert, and so by rank
        counts = choice.bincount(minlength=self.local * self.ranks)
        done = self.on_their_ranks(tokens[order], counts)
        return (torch.zeros_like(tokens).index_copy(0, order, done) * weight[:, None]).view_as(x)

    def on_their_ranks(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """`counts[e]` rows for each expert e, in order; every expert runs, on no rows as well."""
        if self.group is None:
            return self.run_experts(rows, counts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        by_rank = arriving.view(self.ranks, self.local)
        sent, got = counts.view_as(by_rank).sum(1).tolist(), by_rank.sum(1).tolist()
        rows = Exchange.apply(rows, got, sent, self.group)
        whose = torch.arange(self.local).repeat(self.ranks).repeat_interleave(arriving)
        order = whose.argsort(stable=True)
        done = self.run_experts(rows[order], by_rank.sum(0))
        back = torch.zeros_like(done).index_copy(0, order, done)
        return Exchange.apply(back, sent, got, self.group)

    def run_experts(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        parts = rows.split(counts.tolist())
        return torch.cat([run(part) for run, part in zip(self.experts, parts, strict=True)])


def expert(width: int, number: int) -> nn.Module:
    """Expert `number` of a layer, with first values of its own that no other rank needs to know."""
    with torch.random.fork_rng():
        torch.manual_seed(1 + number)
        return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Exchange(torch.autograd.Function):
    """Rows to other ranks: `sent[r]` of them to rank r of the group, `got[r]` from it."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, got: list[int], sent: list[int], group: Any
    ) -> torch.Tensor:
        ctx.way = got, sent, group
        arrived = rows.new_empty(sum(got), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), got, sent, group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        got, sent, group = ctx.way
        return Exchange.apply(gradients[0], sent, got, group), None, None, None
