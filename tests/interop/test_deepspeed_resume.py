"""Runs that DeepSpeed began go on in plain PyTorch as they went on under DeepSpeed."""

from __future__ import annotations

import copy
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import zero_ckpt
from tests.interop.cases import Case
from tests.interop.models import MODELS, batch
from zero_ckpt.errors import StateMismatchError

RESUMED = [
    "align_z2_w2",
    "base_z0_w2_fp32",
    "base_z1_w2_bf16",
    "base_z1_w2_fp32",
    "base_z2_w2_bf16",
    "base_z2_w2_fp16",
    "base_z2_w2_fp32",
    "base_z3_w2_bf16",
    "base_z3_w2_fp32",
    "base_z3_w4_bf16",
    "bf16acc32_z1_w2",
    "client_class_z2_w2",
    "client_rich_z2_w2",
    "fp16overflow_z2_w2",
    "frozen_excl_z2_w2",
    "frozen_z1_w2",
    "frozen_z2_w2",
    "frozen_z3_w2_bf16",
    "groups_z2_w2",
    "groups_z3_w2",
    "nolatest_z2_w2",
    "odd_z2_w4",
    "odd_z3_w4",
    "offload_cpuadam_z2_w2",
    "persist_z3_w2",
    "roundrobin_z2_w2",
    "sched_torch_z3_w2",
    "sched_warmup_z2_w2",
    "sgd_z2_w2",
    "subgroup_z3_w2",
    "tied_z2_w2",
    "tied_z3_w2",
    "twotags_z2_w2",
    "universal_frozen_z2_w2",
    "universal_z1_w2",
    "universal_z2_w2",
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


def gradients(case: Case, model: nn.Module, step: int, rank: int, dtype: torch.dtype) -> list[Any]:
    """As DeepSpeed gets them: of a copy of the weights in the run's precision, the loss scaled."""
    copied = copy.deepcopy(model).to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in batch(model.kind, step, rank)]
    scale = 256.0 if dtype == torch.float16 else 1.0
    (copied(*inputs).float() * scale).backward()
    found = [p.grad for p in copied.parameters() if p.requires_grad]
    return [None if grad is None else grad.float() / scale for grad in found]


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, schedulers: Any) -> None:
    """Two steps on the data of all ranks, with DeepSpeed's default clipping."""
    first = int(case.meta["global_steps"]) - 2
    world = int(case.meta["world_size"])
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(first, first + 2):
        found = [gradients(case, model, step, rank, dtype_of(case)) for rank in range(world)]
        for parameter, *parts in zip(trained, *found, strict=True):
            parameter.grad = None if parts[0] is None else sum(parts) / world
        nn.utils.clip_grad_norm_(trained, case.meta["ds_config"].get("gradient_clipping", 1.0))
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def dtype_of(case: Case) -> torch.dtype:
    config = case.meta["ds_config"]
    if (config.get("bf16") or {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if (config.get("fp16") or {}).get("enabled") else torch.float32


class Anything:
    """Stands for the classes of the user's that one of the runs had in its client state."""

    def __init__(self, *args: object) -> None:
        self.args = args


@pytest.fixture
def _user_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("usertrainer")
    for name in ("TrainState", "Phase", "Meter"):
        setattr(module, name, Anything)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("_user_classes")
@pytest.mark.parametrize("name", RESUMED)
def test_training_goes_on_as_it_did_under_deepspeed(name: str, deepspeed_cases: Path) -> None:
    case = Case(deepspeed_cases / name)
    model = MODELS[case.meta["model"]]()
    left_out = "excl" in name
    if left_out:  # frozen weights are the model's own, which has the run's
        model.load_state_dict(load_file(case.folder / "expected_full_fp32.safetensors"))
    optimizer = optimizer_of(case, model)
    schedulers = []
    if "sched_torch" in name:
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1))
    arguments = (case.directory, model, optimizer, schedulers or None)
    # DeepSpeed's own scheduler is nothing that a job without DeepSpeed has: that is said.
    told = pytest.warns(UserWarning, match="LR scheduler") if "warmup" in name else nullcontext()
    with told:
        path, client_state = zero_ckpt.load_checkpoint(
            *arguments,
            load_module_strict=not left_out,
            tag=case.tags[-1],
            weights_only=False,
        )
    assert path == str(case.directory / case.tags[-1])
    assert bool(client_state) == name.startswith("client")
    if "warmup" in name:
        schedulers.append(WarmUp(optimizer, int(case.meta["global_steps"]) - 2))
    train(case, model, optimizer, schedulers)
    exact = dtype_of(case) == torch.float32
    tolerance = {"rtol": 2e-4, "atol": 2e-6} if exact else {"rtol": 0, "atol": 1e-3}
    found = model.state_dict()
    for key, value in case.after_two_steps.items():
        torch.testing.assert_close(found[key], value, **tolerance)


def test_frozen_weights_that_deepspeed_left_out_are_named_since_its_files_do_not_name_them(
    deepspeed_cases: Path,
) -> None:
    case = Case(deepspeed_cases / "frozen_excl_z2_w2")
    model = MODELS["Frozen"]()
    with pytest.raises(StateMismatchError, match=r"Missing in the checkpoint: 'table', 'fc0\.w"):
        zero_ckpt.load_checkpoint(case.directory, model, tag=case.tag, load_module_only=True)
    result = zero_ckpt.load_checkpoint(
        case.directory, model, tag=case.tag, load_module_only=True, load_module_strict=False
    )
    assert set(result.report.missing) == {"table", "fc0.weight", "fc0.bias", "fc2.bias"}
    assert not result.report.unexpected
    assert torch.equal(model.fc1.weight, case.weights["fc1.weight"])


class WarmUp:
    """DeepSpeed's `WarmupLR` of the run: logarithmic, to 0.01 in ten steps. `step`: the next step's number."""

    def __init__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.optimizer, self.number = optimizer, step

    def step(self) -> None:
        self.number += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * math.log(self.number) / math.log(10)
