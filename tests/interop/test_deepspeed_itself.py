"""With DeepSpeed installed (the extra `deepspeed`): it resumes from what we convert, and we open what it saves."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import zero_ckpt
from tests.interop.models import LM, batch
from tests.workers import run_ranks
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.interop.universal import convert_to_universal

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

RANKS, BEFORE, AFTER = 2, 3, 2
"""Steps that we train before the save, and that DeepSpeed trains after it."""

CASES = [(1, "fp32", 2), (2, "bf16", 2), (3, "fp32", 1)]
"""ZeRO stage, dtype, parameter groups. DeepSpeed at stage 3 gives every group the first one's options and step."""

Case = tuple[int, str, int]
Tensors = dict[str, torch.Tensor]


def groups_of(model: torch.nn.Module, count: int) -> list[dict[str, Any]]:
    """As they are in practice: in the second one vectors, which are not decayed."""
    parameters = list(model.parameters())
    if count == 1:
        return [{"params": parameters, "weight_decay": 0.1}]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def train(folder: Path, groups: int) -> Tensors:
    """Makes a universal checkpoint of ours; returns the weights that the run reached later."""
    torch.manual_seed(0)
    model = LM()
    optimizer = torch.optim.AdamW(groups_of(model, groups), lr=1e-2)
    for step in range(BEFORE + AFTER):
        if step == BEFORE:
            client_state = {"epoch": 2}
            zero_ckpt.save_checkpoint(
                folder / "ours", model, optimizer, tag="t", step=step, client_state=client_state
            )
            convert_to_universal(folder / "ours", folder / "universal")
        optimizer.zero_grad()
        for rank in range(RANKS):
            (model(*batch("lm", step, rank)) / RANKS).backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def resume_in_deepspeed(folder: Path) -> dict[Case, tuple[Any, Tensors, Tensors]]:
    """For each case: the client state's epoch, what DeepSpeed has right after its load, and after more steps."""
    return {case: resume(folder, *case) for case in CASES}


def resume(folder: Path, stage: int, dtype: str, groups: int) -> tuple[Any, Tensors, Tensors]:
    engine = make_engine(stage, dtype, groups)
    _, client_state = engine.load_checkpoint(str(folder / str(groups) / "universal"))
    assert engine.global_steps == BEFORE
    loaded = gathered(engine)
    for step in range(BEFORE, BEFORE + AFTER):
        engine.backward(engine(*batch("lm", step, int(os.environ["RANK"]))))
        engine.step()
    engine.save_checkpoint(str(folder / f"back_{stage}"))
    return client_state["epoch"], loaded, gathered(engine)


def make_engine(stage: int, dtype: str, groups: int) -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    import deepspeed

    # Its own collectives for the CPU would be compiled first; gloo's give the same numbers.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    torch.manual_seed(1)
    model = LM()
    optimizer = torch.optim.AdamW(groups_of(model, groups), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "checkpoint": {"load_universal": True},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def gathered(engine: Any) -> Tensors:
    """Masters, and moments under `<parameter>/<name>`, whole, on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = safe_get_full_fp32_param(parameter).clone()
        for state in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{state}"] = safe_get_full_optimizer_state(parameter, state).clone()
    return found


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_deepspeed_resumes_from_what_we_converted_and_we_open_what_it_saves(tmp_path: Path) -> None:
    expected = {groups: train(tmp_path / str(groups), groups) for groups in (1, 2)}
    results, _ = run_ranks(resume_in_deepspeed, RANKS, tmp_path, timeout=200)
    for (stage, dtype, groups), (epoch, loaded, later) in results.items():
        assert epoch == 2
        assert_holds(tmp_path / str(groups) / "ours", loaded)
        tolerance = {"fp32": 1e-5, "bf16": 2e-2}[dtype]
        for name, value in expected[groups].items():
            assert torch.allclose(later[name], value, rtol=tolerance, atol=tolerance), name
        assert_holds(tmp_path / f"back_{stage}", later)


def assert_holds(directory: Path, tensors: Tensors) -> None:
    """The checkpoint there has these, bitwise."""
    with open_checkpoint(directory) as checkpoint:
        for name, value in tensors.items():
            role = "optim" if "/" in name else "model"
            assert torch.equal(checkpoint.tensor(role, name), value), name
