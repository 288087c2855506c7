"""Runs that DeepSpeed began go on in plain PyTorch as they went on under DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zero_ckpt
from tests.interop.cases import Case
from tests.interop.models import MODELS, batch

RESUMED = [
    "align_z2_w2",
    "base_z0_w2_fp32",
    "base_z1_w2_fp32",
    "base_z2_w2_fp32",
    "base_z3_w2_fp32",
    "client_rich_z2_w2",
    "frozen_z1_w2",
    "frozen_z2_w2",
    "groups_z2_w2",
    "groups_z3_w2",
    "odd_z2_w4",
    "odd_z3_w4",
    "offload_cpuadam_z2_w2",
    "persist_z3_w2",
    "roundrobin_z2_w2",
    "sched_torch_z3_w2",
    "sgd_z2_w2",
    "subgroup_z3_w2",
    "tied_z2_w2",
    "tied_z3_w2",
    "universal_frozen_z2_w2",
    "universal_z1_w2",
    "universal_z3_w2",
]


def groups(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    """As the run had them: what decays, and what does not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.meta.get("param_groups") is None:
        return [{"params": parameters}]
    decay = [p for p in parameters if p.dim() > 1]
    return [{"params": decay}, {"params": [p for p in parameters if p.dim() <= 1]}]


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """Of the run's class, with options that the checkpoint must replace."""
    kind = torch.optim.SGD if "sgd" in case.name else torch.optim.AdamW
    return kind(groups(case, model), lr=0.5, weight_decay=0.7)


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, schedulers: Any) -> None:
    """Two steps on the data of all ranks, with DeepSpeed's default clipping."""
    first = int(case.meta["global_steps"]) - 2
    world = int(case.meta["world_size"])
    for step in range(first, first + 2):
        optimizer.zero_grad()
        for rank in range(world):
            (model(*batch(model.kind, step, rank)) / world).backward()
        nn.utils.clip_grad_norm_(
            model.parameters(), case.meta["ds_config"].get("gradient_clipping", 1.0)
        )
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("name", RESUMED)
def test_training_goes_on_as_it_did_under_deepspeed(name: str, deepspeed_cases: Path) -> None:
    case = Case(deepspeed_cases / name)
    model = MODELS[case.meta["model"]]()
    optimizer = optimizer_of(case, model)
    schedulers = []
    if "sched" in name:
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1))
    path, client_state = zero_ckpt.load_checkpoint(
        case.directory, model, optimizer, schedulers or None, tag=case.tags[-1], weights_only=False
    )
    assert path == str(case.directory / case.tags[-1])
    assert bool(client_state) == name.startswith("client")
    train(case, model, optimizer, schedulers)
    found = model.state_dict()
    for key, value in case.after_two_steps.items():
        torch.testing.assert_close(found[key], value, rtol=2e-4, atol=2e-6)
