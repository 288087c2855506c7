"""The models and data of the cases that tests train on. Their sums must be those of the runs that DeepSpeed made."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BATCH, VOCABULARY = 4, 37


def batch(kind: str, step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rank` saw in step number `step`, counted from 0."""
    generator = torch.Generator()
    generator.manual_seed(7919 * (step + 1) + 104729 * (rank + 1))
    if kind == "lm":
        ids = torch.randint(0, VOCABULARY, (BATCH, 9), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    inputs = torch.randn(BATCH, 13, generator=generator)
    return inputs, torch.randn(BATCH, 5, generator=generator)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.ln2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        split = (rows, length, self.heads, width // self.heads)
        q, k, v = (
            part.view(split).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(width, -1)
        )
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = q @ k.transpose(-1, -2) / split[3] ** 0.5
        attention = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(rows, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class LM(nn.Module):
    kind = "lm"

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, 16)
        self.wpe = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block(16, 2) for _ in range(2)])
        self.ln_f = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))


class TiedLM(LM):
    def __init__(self) -> None:
        super().__init__(tied=True)


class Odd(nn.Module):
    """Every size is odd or tiny: some parameters are smaller than the number of ranks."""

    kind = "mlp"

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.zeros(1, 1))
        self.one = nn.Parameter(torch.zeros(1))
        self.fc1 = nn.Linear(13, 17)
        self.two = nn.Parameter(torch.zeros(2, 1))
        self.three = nn.Parameter(torch.zeros(3))
        self.ln = nn.LayerNorm(17)
        self.cube = nn.Parameter(torch.zeros(3, 1, 7))
        self.fc2 = nn.Linear(17, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.ln(torch.tanh(self.fc1(x))) * self.scalar + self.one
        h = h + self.two.sum() + self.three.sum() + self.cube.sum()
        return F.mse_loss(self.fc2(h), y)


class Frozen(nn.Module):
    kind = "mlp"

    def __init__(self) -> None:
        super().__init__()
        self.fc0 = nn.Linear(13, 15)
        self.fc1 = nn.Linear(15, 9)
        self.table = nn.Parameter(torch.zeros(3, 9))
        self.fc2 = nn.Linear(9, 5)
        self.register_buffer("offset", torch.zeros(5))
        for parameter in (*self.fc0.parameters(), self.table, self.fc2.bias):
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.fc1(torch.tanh(self.fc0(x)))) + self.table.sum(0)
        return F.mse_loss(self.fc2(h) + self.offset, y)


MODELS: dict[str, type[Any]] = {"LM": LM, "TiedLM": TiedLM, "Odd": Odd, "Frozen": Frozen}
