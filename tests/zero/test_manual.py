"""Several backward passes and optimizers per step (a GAN under manual optimization) equal DDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.parallel import DistributedDataParallel

from tests.workers import run_ranks
from tests.zero.training import whole_weights
from zero_ckpt.zero import clip_grad_norm_, make_mesh, shard_module


def layers(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)))


class Gan(nn.Module):
    """Two networks, and parameters that the root itself owns and both losses use."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = layers(4, 9, 7)
        self.discriminator = layers(7, 8, 3)
        self.verdict = nn.Linear(3, 1)
        self.shift = nn.Parameter(torch.zeros(7))

    def fake(self, noise: torch.Tensor) -> torch.Tensor:
        return self.generator(noise) + self.shift

    def judge(self, x: torch.Tensor) -> torch.Tensor:
        return self.verdict(self.discriminator(x))

    def forward(self, method: str, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, method)(x)  # so that DistributedDataParallel sees every call


@contextmanager
def toggled(off: Iterable[torch.Tensor]) -> Iterator[None]:
    """Only the other optimizer's parameters train, as with Lightning's `toggle_optimizer`."""
    off = list(off)
    for parameter in off:
        parameter.requires_grad_(False)
    yield
    for parameter in off:
        parameter.requires_grad_(True)


def _data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return (
        torch.randn(3, 4, generator=generator).double(),
        torch.randn(3, 7, generator=generator).double(),
    )


def _train(gan: Gan, call: Any, toggle: bool, steps: int = 4) -> dict[str, torch.Tensor]:
    of_generator = [*gan.generator.parameters(), gan.shift]
    of_discriminator = [*gan.discriminator.parameters(), *gan.verdict.parameters()]
    optimizers = [
        torch.optim.AdamW(of_generator, lr=1e-2),
        torch.optim.SGD(of_discriminator, lr=1e-1, momentum=0.9),
    ]
    for step in range(steps):
        noise, real = _data(step)
        with toggled(of_discriminator if toggle else ()):
            optimizers[0].zero_grad()
            verdict = call("judge", call("fake", noise))
            bce(verdict, torch.ones_like(verdict)).backward()
            clip_grad_norm_(of_generator, 1e-2)
            optimizers[0].step()
        with toggled(of_generator if toggle else ()):
            optimizers[1].zero_grad()
            verdict = call("judge", real)
            bce(verdict, torch.ones_like(verdict)).backward()
            verdict = call("judge", call("fake", noise).detach())
            bce(verdict, torch.zeros_like(verdict)).backward()
            optimizers[1].step()
    return whole_weights(gan)


def _gan(seed: int = 0) -> Gan:
    torch.manual_seed(seed)
    return Gan().double()


def _equals_ddp(stage: int, toggle: bool) -> None:
    gan = _gan()
    mesh = make_mesh(dist.get_world_size(), None, "cpu")
    sharding = shard_module(gan, stage=stage, mesh=mesh, root="replicate")
    assert "generator.0" in sharding.units
    assert set(sharding.replicated) == {"shift", "verdict.weight", "verdict.bias"}
    reference = _gan()
    ddp = DistributedDataParallel(reference, find_unused_parameters=True)
    mine = _train(gan, gan, toggle)
    torch.testing.assert_close(mine, _train(reference, ddp, toggle), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_gan_with_a_replicated_root_equals_ddp(stage: int, toggle: bool) -> None:
    run_ranks(_equals_ddp, 2, stage, toggle)
