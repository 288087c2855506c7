"""A small model with every kind of parameter, and one training loop for all ZeRO stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from zero_ckpt.zero import (
    clip_grad_norm_,
    clip_grad_value_,
    gradient_sync_disabled,
    make_mesh,
    partition_optimizer,
    shard_module,
)

VOCABULARY = 13
WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 11), nn.GELU(), nn.Linear(11, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """Tied weights, repeated blocks, a scalar, an empty parameter, one smaller than the world."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.shift = nn.Parameter(torch.full((1,), 0.1))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale + self.empty.sum()


def make_net(seed: int = 0) -> nn.Module:
    """Double precision, so that only a wrong computation can differ by more than rounding."""
    torch.manual_seed(seed)
    return Net().double()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


def batch(step: int) -> torch.Tensor:
    """This rank's tokens of one step, [2, 5]."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(0, VOCABULARY, (2, 5), generator=generator)


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def train(
    stage: int,
    *,
    build: Callable[[], nn.Module] = make_net,
    optimize: Callable[[nn.Module], torch.optim.Optimizer] = adam,
    steps: int = 4,
    accumulate: int = 1,
    clip_norm: float | None = None,
    norm_type: float = 2.0,
    clip_value: float | None = None,
    sharding_size: int | None = None,
    **options: Any,
) -> Run:
    """Train for some steps; losses are this rank's, weights are whole. Collective."""
    module = build()
    forward: nn.Module = module
    if stage >= 2:
        mesh = make_mesh(dist.get_world_size(), sharding_size, "cpu")
        shard_module(module, stage=stage, mesh=mesh, **options)
    else:
        forward = DistributedDataParallel(module)
    optimizer = optimize(module)
    if stage == 1:
        optimizer = partition_optimizer(optimizer)
    run = Run()
    for step in range(steps):
        for micro in range(accumulate - 1):
            with gradient_sync_disabled(forward):
                run.losses.append(backward(forward, step * accumulate + micro, accumulate))
        run.losses.append(backward(forward, (step + 1) * accumulate - 1, accumulate))
        if clip_norm is not None:
            norm = clip_grad_norm_(module.parameters(), clip_norm, norm_type)
            run.norms.append(norm.item())
        if clip_value is not None:
            clip_grad_value_(module.parameters(), clip_value)
        optimizer.step()
        optimizer.zero_grad()
    run.weights = whole_weights(module)
    return run


def backward(forward: nn.Module, step: int, accumulate: int) -> float:
    tokens = batch(step)
    logits = forward(tokens[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / accumulate
    loss.backward()
    return loss.item()


class Collectives(TorchDispatchMode):
    """Names of the collectives that ran inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._schema.name.removeprefix("c10d::"))
        return func(*args, **(kwargs or {}))


def whole_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, unsharded. Collective."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    # Cloned in any case: on a mesh of one rank `full_tensor` is no copy.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_equal(run: Run, reference: Run, tolerance: float = 1e-11) -> None:
    """The same losses, norms and weights, to the rounding of double precision."""
    torch.testing.assert_close(run.losses, reference.losses, rtol=tolerance, atol=tolerance)
    # A norm is handed out in single precision.
    torch.testing.assert_close(run.norms, reference.norms, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run.weights, reference.weights, rtol=tolerance, atol=tolerance)


class Fails(torch.autograd.Function):
    """The identity, whose backward pass fails when that is armed."""

    armed = False

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        if Fails.armed:
            raise ArithmeticError("in the middle")
        return gradients[0]
