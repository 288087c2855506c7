"""Norms and clipping over plain tensors and DTensors of several meshes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.workers import run_ranks
from tests.zero.training import whole
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import clip_grad_norm_, clip_grad_value_


def plain(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter with a gradient, equal on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = (10 * torch.randn(shape, generator=generator)).to(dtype)
    return parameter


def spread(parameter: nn.Parameter, mesh: Any, *placements: Any) -> nn.Parameter:
    assert parameter.grad is not None
    data = distribute_tensor(parameter.detach(), mesh, placements)
    result = nn.Parameter(data)
    result.grad = distribute_tensor(parameter.grad.clone(), mesh, placements)
    return result


def _parameters() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same gradients whole, and spread in every way over three meshes of 4 ranks."""
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    wholes = [
        plain(1, 5, 3),
        plain(2, 7),
        plain(3, 9, 2),
        plain(4, 3, 4),
        plain(5, 6, 6),
        plain(6),
        plain(7, 0, 4),
        plain(8, 11, dtype=torch.float64),
        plain(9, 13, dtype=torch.bfloat16),
        nn.Parameter(torch.zeros(4)),  # without gradient
    ]
    spreads = [
        plain(1, 5, 3),
        spread(wholes[1], line, Shard(0)),
        spread(wholes[2], grid, Replicate(), Shard(0)),
        spread(wholes[3], grid, Shard(0), Shard(1)),
        spread(wholes[4], grid, Replicate(), Replicate()),
        plain(6),
        spread(wholes[6], line, Shard(0)),
        spread(wholes[7], grid["shard"], Shard(0)),
        spread(wholes[8], line, Shard(0)),
        nn.Parameter(distribute_tensor(torch.zeros(4), line, (Shard(0),))),
    ]
    return wholes, spreads


def _grads(parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    return [None if p.grad is None else whole(p.grad) for p in parameters]


def _reference_norm(parameters: list[nn.Parameter], norm_type: float) -> torch.Tensor:
    flat = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
    return torch.linalg.vector_norm(flat, norm_type).float()


def _norm_equals_whole(norm_type: float) -> None:
    wholes, spreads = _parameters()
    expected = _reference_norm(wholes, norm_type)
    for parameters in (wholes, spreads):
        before = _grads(parameters)
        total = clip_grad_norm_(parameters, 1e9, norm_type)
        assert not isinstance(total, DTensor)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(_grads(parameters), before, rtol=0, atol=0)
        clip_grad_norm_(parameters, 0.5, norm_type)
    torch.testing.assert_close(_grads(spreads), _grads(wholes))
    torch.testing.assert_close(
        clip_grad_norm_(spreads, 9.0, norm_type), torch.tensor(0.5), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.5, math.inf])
def test_the_norm_of_mixed_gradients_equals_that_of_whole_ones(norm_type: float) -> None:
    run_ranks(_norm_equals_whole, 4, norm_type)


def _value_equals_whole() -> None:
    wholes, spreads = _parameters()
    for parameters in (wholes, spreads):
        clip_grad_value_(parameters, 2.5)
    torch.testing.assert_close(_grads(spreads), _grads(wholes), rtol=0, atol=0)
    assert max(float(g.abs().max()) for g in _grads(wholes) if g is not None and g.numel()) == 2.5


def test_values_of_mixed_gradients_are_clamped() -> None:
    run_ranks(_value_equals_whole, 4)


def _nonfinite_on_one_rank(bad: float) -> None:
    _, spreads = _parameters()
    grad: Any = spreads[1].grad
    if dist.get_rank() == 1:
        grad.to_local()[0] = bad
    before = _grads(spreads[2:])
    with pytest.raises(RuntimeError, match=r"total norm of order 2\.0 .* cannot be clipped"):
        clip_grad_norm_(spreads, 1.0, error_if_nonfinite=True)
    torch.testing.assert_close(_grads(spreads[2:]), before, rtol=0, atol=0)
    assert not math.isfinite(clip_grad_norm_(spreads, 1.0))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_ranks_bad_gradient_raises_on_every_rank(bad: float) -> None:
    run_ranks(_nonfinite_on_one_rank, 4, bad)


def _missing_on_one_rank() -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameter = spread(plain(1, 4), mesh, Shard(0))
    if dist.get_rank() == 1:
        parameter.grad = None
    expected = plain(1, 4).grad
    assert expected is not None
    total = clip_grad_norm_(parameter, 1e9)
    torch.testing.assert_close(total, torch.linalg.vector_norm(expected[:2]))


def test_a_gradient_missing_on_one_rank_does_not_hang() -> None:
    run_ranks(_missing_on_one_rank, 2)


def _pending_reduction() -> None:
    mesh = init_device_mesh("cpu", (1,))
    parameter = spread(plain(1, 4), mesh, Shard(0))
    parameter.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(ConfigurationError, match="pending reduction"):
        clip_grad_norm_([parameter], 1.0)


def test_a_gradient_with_a_pending_reduction_is_refused() -> None:
    run_ranks(_pending_reduction, 1)


def test_without_a_process_group_plain_gradients_clip_as_torch_does() -> None:
    mine, theirs = [plain(1, 5), plain(2, 3, 3)], [plain(1, 5), plain(2, 3, 3)]
    total = clip_grad_norm_(mine, 1.0)
    torch.testing.assert_close(total, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    torch.testing.assert_close([p.grad for p in mine], [p.grad for p in theirs])
    assert clip_grad_norm_([], 1.0) == 0


def test_the_norm_of_a_narrow_dtype_does_not_overflow() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    parameter.grad = torch.full((4,), 6e4, dtype=torch.float16)
    assert clip_grad_norm_(parameter, 1.0) == pytest.approx(1.2e5, rel=1e-3)
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.5, dtype=torch.float16))


@pytest.mark.parametrize("norm_type", [0.0, -1.0, -math.inf, math.nan])
def test_a_norm_type_that_is_no_norm_is_refused(norm_type: float) -> None:
    with pytest.raises(ConfigurationError, match="norm_type must be positive or inf"):
        clip_grad_norm_([plain(1, 2)], 1.0, norm_type)
