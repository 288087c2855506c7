"""DeepSpeed's mixtures of experts load into declared experts at another expert-parallel size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import zero_ckpt
from tests.interop.cases import Case
from tests.workers import run_ranks
from tests.zero.moe import merged
from zero_ckpt.zero import declare_experts

EXPERTS = 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)


def moe_layer(local: int) -> nn.Module:
    """The modules that hold the parameters of DeepSpeed's `MoE`, as they are called there."""
    layer = nn.Module()
    layer.deepspeed_moe = nn.Module()
    layer.deepspeed_moe.gate = nn.Module()
    layer.deepspeed_moe.gate.wg = nn.Linear(8, EXPERTS, bias=False)
    layer.deepspeed_moe.experts = nn.Module()
    layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(Expert() for _ in range(local))
    return layer


class Net(nn.Module):
    def __init__(self, local: int) -> None:
        super().__init__()
        self.inp = nn.Linear(13, 8)
        self.moes = nn.ModuleList(moe_layer(local) for _ in range(2))
        self.out = nn.Linear(8, 5)


def _load(folder: str) -> dict[str, torch.Tensor]:
    """One expert-parallel group of all ranks."""
    case, world = Case(Path(folder)), dist.get_world_size()
    net: Any = Net(EXPERTS // world)
    lists = [layer.deepspeed_moe.experts.deepspeed_experts for layer in net.moes]
    declare_experts(net, lists, init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    zero_ckpt.load_checkpoint(case.directory, net, optimizer, tag=case.tag)
    assert optimizer.param_groups[0]["lr"] == 0.01
    first, found = dist.get_rank() * EXPERTS // world, {}
    for name, parameter in net.named_parameters():
        head, mark, rest = name.partition("deepspeed_experts.")
        number, _, tail = rest.partition(".")
        name = f"{head}{mark}{first + int(number)}.{tail}" if mark else name
        found[name] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found[f"{name}/{key}"] = optimizer.state[parameter][key]
    return found


@pytest.mark.parametrize("name", ["moe_z0_w2_ep2", "moe_z1_w2_ep2", "moe_z2_w2_ep1"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_experts_and_their_adam_state_load_at_any_size(
    name: str, world: int, deepspeed_cases: Path
) -> None:
    case = Case(deepspeed_cases / name)
    found = merged(run_ranks(_load, world, str(case.folder)))
    for key, value in case.weights.items():
        assert torch.equal(found.pop(key), value), key
    for state, values in case.optimizer["state"].items():
        for key, value in values.items():
            assert torch.equal(found.pop(f"{key}/{state}"), value), (key, state)
    assert {float(step) for step in found.values()} == {3.0}
