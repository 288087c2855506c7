"""Experts on different ranks train at every stage as one model with all experts does on all data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.workers import run_ranks
from tests.zero import moe
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import declare_experts, make_mesh, shard_module

TOLERANCE = 1e-9


def _equals_reference(
    stage: int, parts: int, training: dict[str, Any], net: dict[str, Any], sharding: dict[str, Any]
) -> None:
    mesh = moe.expert_mesh(parts)
    run = moe.prepare(moe.make_local(mesh, **net), stage, **sharding)
    moe.steps(run, **training)
    expected = moe.reference(**training, **net)
    torch.testing.assert_close(run.losses, expected.losses, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(run.norms, expected.norms, rtol=1e-6, atol=1e-6)
    found, wanted = moe.everything(run, mesh), moe.everything(expected, None)
    for name in [
        name for name in found if not name.endswith("seen")
    ]:  # each rank counts its own rows
        torch.testing.assert_close(
            found[name], wanted[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name
        )
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


def _declare_wrongly(case: str) -> str:
    mesh = moe.expert_mesh(2)
    rank = dist.get_rank()
    net = moe.make_local(mesh, declare=False)
    lists: list[Any] = net.expert_lists
    model: nn.Module = net
    if case == "uneven":
        if rank == 1:
            lists[0].append(moe.Expert().double())
    elif case == "twice":
        lists.append(lists[0])
    elif case == "nested":
        lists[0][0].inner = nn.ModuleList([nn.Linear(1, 1)])
        lists.append(lists[0][0].inner)
    elif case == "other mesh":
        declare_experts(net, lists, mesh)
        mesh = init_device_mesh("cpu", (2, 1))
    elif case == "tied":
        net.out.weight = lists[0][0].up.bias  # type: ignore[assignment]
    elif case == "empty":
        net.more = nn.ModuleList()
        lists.append(net.more)
    elif case == "foreign":
        lists = [nn.ModuleList([moe.Expert()])]
    elif case == "wrapped":
        model = DistributedDataParallel(net)
    elif case == "one rank":
        lists = lists[:1] if rank else lists
    with pytest.raises(ConfigurationError) as caught:
        declare_experts(model, lists, mesh)
    return str(caught.value)


def _skip_an_expert() -> None:
    mesh = moe.expert_mesh(1)
    run = moe.prepare(moe.make_local(mesh, skip_idle=True), 3)
    rows = torch.zeros(1, 3, dtype=torch.double)
    with pytest.raises(ConfigurationError, match=r"'layers.0.experts' and left out .* empty input"):
        run.forward(rows)


def test_a_skipped_expert_is_an_error_where_ranks_gather_it_together() -> None:
    run_ranks(_skip_an_expert, 2)


WRONG = {
    "uneven": "'layers.0.experts' has 2 experts on rank 0 and 3 on rank 1: every rank must have the same number",
    "twice": "'layers.0.experts' is declared twice",
    "nested": "the lists of experts 'layers.0.experts' and 'layers.0.experts.0.inner' overlap",
    "other mesh": "'layers.0.experts' is declared already, over another mesh",
    "tied": "'layers.0.experts.0.up.bias' and 'out.weight' are one tensor",
    "empty": "'more' is an empty list of experts",
    "foreign": "a ModuleList was declared as experts: expected ModuleLists of the model",
    "wrapped": "the model is wrapped in DistributedDataParallel",
    "one rank": "rank 1 ['layers.0.experts']: declare the same lists on every rank",
}


def _declare_all_wrongly() -> dict[str, str]:
    return {case: _declare_wrongly(case) for case in WRONG}


def test_what_cannot_be_declared_is_refused_on_every_rank_alike() -> None:
    first, second = run_ranks(_declare_all_wrongly, 2)
    assert first == second
    for case, text in WRONG.items():
        assert text in first[case], case


def _train_a_copy() -> None:
    net = copy.deepcopy(moe.make_local(moe.expert_mesh(2)))
    with pytest.raises(
        ConfigurationError, match=r"'layers.0.experts' is a copy .* declare the copy"
    ):
        shard_module(net, stage=3, mesh=make_mesh(2, None, "cpu"))
    declare_experts(net, net.expert_lists, moe.expert_mesh(2))
    shard_module(net, stage=3, mesh=make_mesh(2, None, "cpu"))
    assert all(isinstance(p, DTensor) for p in net.layers[0].experts[0].up.parameters())


def test_a_copy_is_declared_before_it_is_trained() -> None:
    run_ranks(_train_a_copy, 2)
