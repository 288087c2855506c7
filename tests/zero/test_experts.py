"""Experts on different ranks train at every stage as one model with all experts does on all data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.workers import run_ranks
from tests.zero import moe

TOLERANCE = 1e-9


def _equals_reference(
    stage: int, parts: int, training: dict[str, Any], net: dict[str, Any], sharding: dict[str, Any]
) -> None:
    mesh = moe.expert_mesh(parts)
    run = moe.prepare(moe.make_local(mesh, **net), stage, **sharding)
    moe.steps(run, **training)
    expected = moe.reference(**training)
    torch.testing.assert_close(run.losses, expected.losses, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(run.norms, expected.norms, rtol=1e-6, atol=1e-6)
    state = {k: v for k, v in moe.whole_state(run.module).items() if not k.endswith("seen")}
    wanted = moe.local_part(expected.module.state_dict(), mesh)
    wanted = {k: v for k, v in wanted.items() if not k.endswith("seen")}
    torch.testing.assert_close(state, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert min(run.norms) > training.get("clip", 0.02), "clipping has changed nothing"


def check(
    stage: int,
    world_size: int,
    parts: int,
    net: dict[str, Any] | None = None,
    sharding: dict[str, Any] | None = None,
    **training: Any,
) -> None:
    run_ranks(_equals_reference, world_size, stage, parts, training, net or {}, sharding or {})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_on_two_ranks_train_as_one_model(stage: int) -> None:
    check(stage, 2, 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_with_replicas_train_as_one_model(stage: int) -> None:
    check(stage, 4, 2)


@pytest.mark.parametrize("stage", [0, 3])
def test_one_expert_per_rank_trains_as_one_model(stage: int) -> None:
    check(stage, 4, 4)


@pytest.mark.parametrize("stage", [0, 2])
def test_replicas_alone_train_as_one_model(stage: int) -> None:
    check(stage, 2, 1)


@pytest.mark.parametrize("stage", [0, 3])
def test_accumulated_gradients_of_experts_are_right(stage: int) -> None:
    check(stage, 4, 2, accumulate=2)


def test_a_replicated_root_leaves_experts_right() -> None:
    check(3, 4, 2, sharding={"root": "replicate"})


def test_an_expert_without_tokens_may_be_skipped_at_stage_0() -> None:
    check(0, 4, 2, net={"skip_idle": True})
