"""Precision names, and loss scaling where gradients are sharded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.workers import run_ranks
from tests.zero.training import adam, backward, batch, make_net, whole, whole_weights
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import ShardedGradScaler, make_mesh, mixed_precision_policy, shard_module

NAMES = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", 32, "16", "bf16"]


@pytest.mark.parametrize("precision", NAMES)
def test_under_autocast_parameters_keep_their_dtype(precision: str | int) -> None:
    assert mixed_precision_policy(precision) == MixedPrecisionPolicy()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_without_autocast_mixed_precision_reduces_in_float32(
    precision: str, dtype: torch.dtype
) -> None:
    policy = mixed_precision_policy(precision, autocast=False)
    assert (policy.param_dtype, policy.reduce_dtype) == (dtype, torch.float32)
    assert policy.cast_forward_inputs
    assert mixed_precision_policy("bf16-true", autocast=False) == MixedPrecisionPolicy()


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'nf4' is not supported.*'32-true'"):
        mixed_precision_policy("nf4")


def _scaler() -> ShardedGradScaler:
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    return ShardedGradScaler.adopt(theirs)


def _poison(module: nn.Module, where: str) -> None:
    """Put an inf into the gradient of one parameter, on rank 1 only."""
    gradients = {name: p.grad for name, p in module.named_parameters()}
    grad: Any = gradients[where]
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    if dist.get_rank() == 1 or not isinstance(grad, DTensor):
        local.view(-1)[0] = math.inf


def _train(module: nn.Module, forward: nn.Module, scaler: Any, poisoned: str) -> list[float]:
    optimizer = adam(module)
    scales = []
    for step in range(5):
        _scaled_backward(forward, scaler, step)
        if step == 2:
            _poison(module, poisoned)
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def _scaled_backward(forward: nn.Module, scaler: Any, step: int) -> None:
    tokens = batch(step)
    logits = forward(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    scaler.scale(loss).backward()


def _scaling_equals_stage_0(root: str, poisoned: str) -> None:
    net, reference = make_net(), make_net()
    mesh = make_mesh(dist.get_world_size(), None, "cpu")
    shard_module(net, stage=3, mesh=mesh, root=root)
    scales = _train(net, net, _scaler(), poisoned)
    plain = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    expected = _train(reference, DistributedDataParallel(reference), plain, poisoned)
    assert scales == expected == [1024, 2048, 1024, 1024, 2048]  # step 2 was skipped
    torch.testing.assert_close(whole_weights(net), whole_weights(reference), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("poisoned", ["blocks.1.mlp.0.weight", "scale"])
@pytest.mark.parametrize("root", ["shard", "replicate"])
def test_an_overflow_on_one_rank_makes_all_ranks_skip_the_step(root: str, poisoned: str) -> None:
    run_ranks(_scaling_equals_stage_0, 2, root, poisoned)


def _unscales_in_place() -> None:
    net = make_net()
    shard_module(net, stage=3, mesh=make_mesh(2, None, "cpu"))
    scaler = _scaler()
    optimizer = adam(net)
    _scaled_backward(net, scaler, 0)
    scaler.unscale_(optimizer)
    scaled = {name: whole(p.grad) for name, p in net.named_parameters() if p.grad is not None}
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    net.zero_grad()
    backward(net, 0, 1)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(scaled[name], whole(parameter.grad), rtol=1e-11, atol=1e-11)


def test_gradients_are_unscaled_once_in_place() -> None:
    run_ranks(_unscales_in_place, 2)


def test_an_adopted_scaler_keeps_its_settings_and_state() -> None:
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=3.0, growth_interval=7)
    mine = ShardedGradScaler.adopt(theirs)
    assert mine.state_dict() == theirs.state_dict()
    assert ShardedGradScaler.adopt(mine) is mine


def test_float16_gradients_are_refused_as_by_torch() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    parameter.grad = torch.ones(2, dtype=torch.float16)
    scaler = _scaler()
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(torch.optim.SGD([parameter], lr=0.1))
