"""Experts on different ranks under an attached accelerator: trained as one model, resumed at other sizes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from tests.accelerate.harness import fsdp2, on_ranks
from tests.zero import moe
from zero_ckpt.accelerate import attach
from zero_ckpt.errors import ConfigurationError

STEPS, CLIP = 3, 0.02


def make(stage: int | None, parts: int, seed: int) -> tuple[Any, moe.Trained, Any]:
    accelerator = attach(Accelerator(cpu=True), stage=stage, export=False)
    mesh = moe.expert_mesh(parts) if parts else None
    net = moe.make_net(seed) if mesh is None else moe.make_local(mesh, seed)
    model, optimizer = accelerator.prepare(net, moe.adam(net))
    return accelerator, moe.Trained(net, model, optimizer.optimizer), mesh


def steps(accelerator: Any, run: moe.Trained, start: int, rows: int) -> None:
    """On the rows of `rows` ranks, of which each process takes its part."""
    world = dist.get_world_size()
    for step in range(start, start + STEPS):
        every = torch.cat([moe.batch(step, rank) for rank in range(rows)])
        mine = every.tensor_split(world)[dist.get_rank()]
        loss = (run.forward(mine) - mine.sum(-1, keepdim=True)).square().mean()
        accelerator.backward(loss)
        run.norms.append(float(accelerator.clip_grad_norm_(run.module.parameters(), CLIP)))
        run.optimizer.step()
        run.optimizer.zero_grad()


def _train(stage: int | None, directory: str) -> None:
    accelerator, run, mesh = make(stage, 2, seed=0)
    steps(accelerator, run, 0, dist.get_world_size())
    accelerator.save_state(directory)
    with pytest.raises(ConfigurationError, match="there is no state dict of it in one process"):
        accelerator.get_state_dict(run.forward)
    compare(run, mesh, moe.reference(STEPS, clip=CLIP))


def compare(run: moe.Trained, mesh: Any, expected: moe.Trained) -> None:
    torch.testing.assert_close(run.norms, expected.norms[-STEPS:], rtol=1e-6, atol=1e-6)
    found, wanted = moe.everything(run, mesh), moe.everything(expected, None)
    for name in [name for name in found if not name.endswith("seen")]:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)


def _resume(directory: str, parts: int) -> None:
    """At 2 processes' batches, however many processes there are."""
    warnings.filterwarnings("ignore", ".*was saved by", UserWarning)
    accelerator, run, mesh = make(2 if parts else None, parts, seed=1)
    accelerator.load_state(directory)
    steps(accelerator, run, STEPS, 2)
    expected = moe.reference(2 * STEPS, clip=CLIP, ranks=2)
    compare(run, mesh, expected)


@pytest.mark.parametrize("stage", [None, 1, 3])
def test_experts_train_as_one_model_and_resume_at_other_sizes(
    stage: int | None, tmp_path: Path
) -> None:
    on_ranks(_train, 2, stage, str(tmp_path))
    on_ranks(_resume, 1, str(tmp_path), 0)
    if stage == 3:
        on_ranks(_resume, 4, str(tmp_path), 4)


def _refuse_fsdp() -> None:
    accelerator = attach(fsdp2(), export=False)
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = ["Mixture"]
    net = moe.make_local(moe.expert_mesh(2))
    with pytest.raises(
        ConfigurationError, match="declared experts, which FSDP would take for copies"
    ):
        accelerator.prepare(net, moe.adam(net))


def test_accelerates_own_sharding_of_experts_is_refused() -> None:
    on_ranks(_refuse_fsdp, 2)
