"""The examples' model: plain PyTorch. It knows nothing about ZeRO, checkpoints or a framework."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256  # one token per byte


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864) of (..., time, width), same shape and dtype."""
    time, width = x.shape[-2:]
    frequency = 10000.0 ** (torch.arange(0, width, 2, device=x.device) / -width)
    angle = torch.arange(time, device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class Block(nn.Module):
    """One transformer layer: (batch, time, width) to the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        # (batch, time, 3, heads, width of a head)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).flatten(-2))


class GPT(nn.Module):
    """A byte-level language model: (batch, time) int64 bytes to (batch, time, 256) float logits."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats per byte, of (batch, time + 1) bytes: each predicts the next."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def write(model: nn.Module, prompt: str, length: int, context: int, seed: int = 0) -> str:
    """Return `prompt` continued by `length` bytes sampled from `model`, `context` bytes in view."""
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        likely = (model(tokens[:, -context:])[0, -1] / 0.7).softmax(-1)  # 0.7: the temperature
        tokens = torch.cat([tokens, torch.multinomial(likely, 1, generator=chance)[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")
