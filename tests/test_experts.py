"""Experts on different ranks in checkpoints: each is there once, under its layer's number, and loads anywhere."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.workers import run_ranks
from tests.zero import moe
from zero_ckpt import Checkpointer, get_fp32_state_dict_from_zero_checkpoint
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import StateMismatchError
from zero_ckpt.fp32 import export_fp32
from zero_ckpt.zero import declare_experts

State = dict[str, torch.Tensor]

KINDS = {
    "two ranks": (2, 2, 0),
    "four ranks, stage 1": (4, 4, 1),
    "two ranks and replicas": (4, 2, 0),
    "two ranks and replicas, stage 3": (4, 2, 3),
    "whole": (1, 1, 0),
}
"""world size, expert-parallel size, ZeRO stage"""


def make(kind: str, seed: int) -> tuple[moe.Trained, Any]:
    world, parts, stage = KINDS[kind]
    assert dist.get_world_size() == world
    if world == 1:
        net = moe.make_net(seed)
        return moe.Trained(net, net, moe.adam(net)), None
    mesh = moe.expert_mesh(parts)
    return moe.prepare(moe.make_local(mesh, seed), stage), mesh


def checkpointer_of(run: moe.Trained) -> Checkpointer:
    return Checkpointer(run.forward, run.optimizer, rng=False)


def _save(kind: str, directory: str) -> State:
    run, mesh = make(kind, seed=0)
    moe.steps(run, 2)
    checkpointer_of(run).save_checkpoint(directory, "trained", client_state="saved")
    return moe.everything(run, mesh)


def _load(kind: str, directory: str) -> State:
    run, mesh = make(kind, seed=1)
    assert checkpointer_of(run).load_checkpoint(directory)[1] == "saved"
    return moe.everything(run, mesh)


def save(kind: str, directory: Path) -> State:
    return moe.merged(run_ranks(_save, KINDS[kind][0], kind, str(directory)))


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("saved", KINDS)
def test_experts_load_at_any_other_size_bitwise(saved: str, tmp_path: Path) -> None:
    expected = save(saved, tmp_path)
    for kind in KINDS:
        if kind != saved:
            parts = run_ranks(_load, KINDS[kind][0], kind, str(tmp_path))
            assert_equal(moe.merged(parts), expected)


def _save_along(mesh_dim: int | str, directory: str) -> State:
    """Ranks 0 and 1 have the same experts, as have 2 and 3."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "expert_data"))
    local = moe.make_local(mesh, declare=False)
    declare_experts(local, local.expert_lists, mesh, mesh_dim=mesh_dim)
    run = moe.prepare(local, 1)
    moe.steps(run, 2)
    checkpointer_of(run).save_checkpoint(directory, "trained", client_state="saved")
    trained, reference = moe.everything(run, mesh), moe.reference(2)
    assert torch.allclose(torch.tensor(run.losses), torch.tensor(reference.losses), atol=1e-12)
    return trained


@pytest.mark.parametrize("mesh_dim", ["expert", 0, -2])
def test_experts_may_differ_along_any_dimension_of_the_mesh(
    mesh_dim: int | str, tmp_path: Path
) -> None:
    expected = moe.merged(run_ranks(_save_along, 4, mesh_dim, str(tmp_path)))
    for kind in ("whole", "two ranks"):
        found = moe.merged(run_ranks(_load, KINDS[kind][0], kind, str(tmp_path)))
        assert_equal(found, expected)


def test_each_expert_is_written_once_under_its_number(tmp_path: Path) -> None:
    expected = save("two ranks and replicas", tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.keys("model") + checkpoint.keys("optim")) == expected.keys()
        manifest = checkpoint.manifest
        assert {k for k in expected if k.endswith("seen")} == set(manifest.buffers)
        groups = checkpoint.objects()["optimizers"][""]["groups"]
        assert set(groups[0]["params"]) == {n for n, _ in moe.make_net().named_parameters()}
    stored = sum(f.nbytes for f in manifest.files.values())
    assert stored < 1.5 * sum(t.nbytes for t in expected.values()) + 6 * 16_384


def test_the_collapse_holds_all_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = save("four ranks, stage 1", tmp_path)
    net = moe.Net()
    net.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(tmp_path), strict=True)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    export_fp32(tmp_path, tmp_path / "out.safetensors")
    from safetensors.torch import load_file

    from zero_ckpt.cli import main

    moe.Net().load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    assert main(["inspect", str(tmp_path / "trained"), "--json"]) == 0
    shown = capsys.readouterr().out
    assert "layers.1.experts.3.up.weight" in json.dumps(json.loads(shown))


def _refuse(case: str, directory: str) -> str:
    """What a save or a load says."""
    mesh = moe.expert_mesh(2)
    net = moe.make_local(mesh, declare=case != "not everywhere")
    optimizer = moe.adam(net)
    if case == "not everywhere":
        declared = net if dist.get_rank() == 0 else copy.deepcopy(net)
        declare_experts(declared, declared.expert_lists, mesh)
    elif case == "grown":
        net.layers[0].experts.append(moe.Expert().double())
    elif case == "groups":
        own = list(net.layers[0].experts[0].parameters()) if dist.get_rank() else []
        rest = [p for p in net.parameters() if not any(p is o for o in own)]
        optimizer = torch.optim.Adam([{"params": rest}] + [{"params": own, "lr": 1.0}] * bool(own))
    elif case == "extra":
        net.layers[0].experts[1].__class__ = Noting
    checkpointer = Checkpointer(net, optimizer, rng=False)
    with pytest.raises(StateMismatchError) as caught:
        checkpointer.save_checkpoint(directory, "refused")
    return str(caught.value)


class Noting(moe.Expert):
    def get_extra_state(self) -> dict[str, Any]:
        return {"notes": 1}

    def set_extra_state(self, state: dict[str, Any]) -> None: ...


REFUSED = {
    "not everywhere": "'layers.0.experts' is a declared list of experts on some ranks, and not on rank 1",
    "grown": "was declared with 2 on each rank and has 3 now",
    "groups": "ranks put the parameters of their experts into different groups of an optimizer",
    "extra": "'layers.0.experts.1._extra_state': a module of an expert has extra state",
}


def _refuse_all(directory: str) -> dict[str, str]:
    return {case: _refuse(case, directory) for case in REFUSED}


def test_a_save_that_would_lose_experts_is_refused_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(_refuse_all, 2, str(tmp_path))
    for case, text in REFUSED.items():
        assert text in first[case], case
        assert text.partition("experts.")[2][1:] in second[case], case
    assert not (tmp_path / "refused").exists()


def _load_wrongly(directory: str, change: Callable[[nn.Module], None] | None = None) -> str:
    mesh = moe.expert_mesh(2)
    net = moe.make_local(mesh, seed=1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(StateMismatchError) as caught:
        Checkpointer(net, rng=False).load_checkpoint(directory, load_module_only=True)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    return str(caught.value)


def _save_changed(directory: str, case: str) -> None:
    net: Any = moe.make_net()
    if case == "too few":
        del net.layers[1].experts[3]
    elif case == "too many":
        net.layers[1].experts.append(moe.Expert().double())
    else:
        net.layers[1].experts[2].surplus = nn.Parameter(torch.zeros(1))
    Checkpointer(net, rng=False).save_checkpoint(directory, "changed")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("too few", "rank 1: .*Missing in the checkpoint: 'layers.1.experts.3.scale'"),
        ("too many", "In the checkpoint but not in the model: 'layers.1.experts.4.scale'"),
        ("surplus", "rank 1: .*not in the model: 'layers.1.experts.2.surplus'"),
    ],
)
def test_an_expert_that_is_missing_or_that_nobody_holds_is_named(
    case: str, expected: str, tmp_path: Path
) -> None:
    import re

    run_ranks(_save_changed, 1, str(tmp_path), case)
    first, second = run_ranks(_load_wrongly, 2, str(tmp_path))
    assert first == second
    assert re.search(expected, first), first


def _save_copy(directory: str) -> State:
    """A copy of declared experts, as callbacks make for averaged weights, with frozen and tied tensors."""
    mesh = moe.expert_mesh(2)
    net: Any = copy.deepcopy(moe.make_local(mesh))
    if dist.get_rank() == 1:
        net.layers[0].experts[0].up.requires_grad_(False)
    Checkpointer(nn.ModuleDict({"ema": net}), rng=False).save_checkpoint(directory, "all")
    Checkpointer(net, rng=False).save_checkpoint(directory, "thin", exclude_frozen_parameters=True)
    other: Any = moe.make_local(mesh, seed=1)
    mine = other.layers[0].experts[0].up.weight.clone()
    if dist.get_rank() == 1:
        other.layers[0].experts[0].up.requires_grad_(False)
    Checkpointer(other, rng=False).load_checkpoint(directory, "thin")
    kept = other.layers[0].experts[0].up.weight
    assert torch.equal(kept, mine) == (dist.get_rank() == 1)
    return moe.everything(moe.Trained(net, net, moe.adam(net)), mesh)


def test_what_differs_between_ranks_experts_is_recorded(tmp_path: Path) -> None:
    expected = moe.merged(run_ranks(_save_copy, 2, str(tmp_path)))
    frozen = [f"layers.0.experts.2.up.{name}" for name in ("bias", "weight")]
    with open_checkpoint(tmp_path, "all") as checkpoint:
        assert checkpoint.manifest.frozen == [f"ema.{name}" for name in frozen]
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.tensor("model", f"ema.{name}"), tensor), name
    with open_checkpoint(tmp_path, "thin") as checkpoint:
        assert checkpoint.manifest.excluded == frozen
        assert set(checkpoint.keys("model")) == expected.keys() - set(frozen)
