"""At stages 2 and 3 gradients are reduced, and given up, where DDP reduces or loses them; and buffers are shared where
DDP shares them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate.utils import GradientAccumulationPlugin

from tests.accelerate.harness import batches, make, on_ranks, train
from zero_ckpt.accelerate.base import prepared_model


def one_pass(made: Any, x: torch.Tensor) -> float:
    accelerator, model, *_ = made
    loss = (model(x) - 1).pow(2).mean()
    accelerator.backward(loss)
    return float(loss.detach())


def step(made: Any) -> None:
    made[2].step()
    made[2].zero_grad()


def by_hand(made: Any, xs: list[torch.Tensor]) -> list[float]:
    accelerator, model, *_ = made
    losses = []
    for index, x in enumerate(xs):
        with accelerator.no_sync(model) if index % 3 else nullcontext():
            losses.append(one_pass(made, x))
        if index % 3 == 0:
            step(made)
    return losses


def nested(made: Any, xs: list[torch.Tensor]) -> list[float]:
    accelerator, model, *_ = made
    losses = []
    for first, second, third in zip(xs[::3], xs[1::3], xs[2::3], strict=True):
        with accelerator.no_sync(model):
            with accelerator.no_sync(model):
                losses.append(one_pass(made, first))
            losses.append(one_pass(made, second))
        losses.append(one_pass(made, third))
        step(made)
    return losses


def triggered(made: Any, xs: list[torch.Tensor]) -> list[float]:
    accelerator, model, *_ = made
    losses = []
    for first, second in zip(xs[::2], xs[1::2], strict=False):
        with accelerator.no_sync(model):
            one, two = [(model(x) - 1).pow(2).mean() for x in (first, second)]
            accelerator.backward(one)
            with accelerator.trigger_sync_in_backward(model):
                accelerator.backward(two)
        losses += [one.item(), two.item()]
        step(made)
    return losses


def dropped(made: Any, xs: list[torch.Tensor]) -> list[float]:
    accelerator, model, optimizer, _ = made
    losses = []
    for first, second, third in zip(xs[::3], xs[1::3], xs[2::3], strict=True):
        with accelerator.no_sync(model):
            one_pass(made, first)
        optimizer.zero_grad()
        for x in (second, third):
            losses.append(one_pass(made, x))
            step(made)
    return losses


def reduced_each_time(made: Any, xs: list[torch.Tensor]) -> list[float]:
    return train(made, xs)


WAYS: list[tuple[Any, dict[str, Any]]] = [
    (by_hand, {}),
    (nested, {}),
    (triggered, {}),
    (dropped, {}),
    (reduced_each_time, {"num_steps": 2, "sync_each_batch": True}),
]


def all_ways(kind: int | None) -> list[Any]:
    """Losses, and buffers of every rank, which are shared before passes that follow a reducing one."""
    seen = []
    for way, plugin in WAYS:
        given = {"gradient_accumulation_plugin": GradientAccumulationPlugin(**plugin)}
        made = make(kind, **(given if plugin else {}))
        losses = way(made, batches(9))
        seen.append((way.__name__, losses, prepared_model(made[1]).norm.running_mean.tolist()))
    return seen


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_reduced_and_dropped_as_under_ddp(stage: int) -> None:
    sharded, ddp = (on_ranks(all_ways, 2, kind) for kind in (stage, None))
    for ours, theirs in zip(sharded[0] + sharded[1], ddp[0] + ddp[1], strict=True):
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-3, atol=1e-4)
