"""A Trainer in one program: what is called before, between and after its runs, and runs that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.accelerate import trainer_jobs as jobs
from tests.accelerate.trainer_jobs import Job
from tests.workers import run_ranks


def evaluated_first(job: Job) -> tuple[dict[int, float], torch.Tensor]:
    """Losses, and this rank's weights if they are whole."""
    trainer, losses = jobs.make_trainer(job)
    state = torch.get_rng_state()
    trainer.evaluate()
    torch.set_rng_state(state)
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model)
    return losses.seen, weights.get("transformer.wte.weight", torch.empty(0)).clone()


@pytest.mark.parametrize("stage", [None, 1, 2])
def test_a_trainer_that_evaluated_first_trains_all_ranks_together(
    tmp_path: Path, stage: Any
) -> None:
    arguments = (("max_steps", 4), ("save_strategy", "no"))
    job = Job(str(tmp_path), stage, arguments=arguments)
    (seen, one), (_, other) = run_ranks(evaluated_first, 2, job)
    assert not other.numel() or torch.equal(one, other)
    expected = run_ranks(jobs.run, 2, Job(str(tmp_path), None, arguments=arguments))[0]
    assert seen == pytest.approx(expected.losses, rel=1e-3)


def best_of_models_alone(job: Job) -> dict[str, torch.Tensor]:
    """The weights at the end. Then a run begins with those of a checkpoint."""
    trainer, _ = jobs.make_trainer(job)
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model)
    ended_with = {key: value.detach().clone() for key, value in weights.items()}
    trainer.train(resume_from_checkpoint=f"{job.folder}/checkpoint-2")
    return ended_with


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_weights_without_a_part_of_ours_go_into_a_sharded_model(tmp_path: Path, stage: Any) -> None:
    arguments = (
        *jobs.keeping_best(2),
        ("save_only_model", True),
        ("save_steps", 2),
        ("max_steps", 4),
    )
    job = Job(str(tmp_path), stage, arguments=arguments)
    weights = run_ranks(best_of_models_alone, 2, job)[0]
    stored = load_file(f"{tmp_path}/checkpoint-2/model.safetensors")
    assert [key for key in stored if not torch.equal(stored[key], weights[key])] == []


def out_of_memory(job: Job) -> tuple[dict[int, float], int]:
    """Its first backward pass fails as when memory runs out, on every rank; then the batch is halved."""
    trainer, losses = jobs.make_trainer(job)
    passes = 0

    def fail_once(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise RuntimeError("CUDA out of memory.")

    model: Any = trainer.model
    model.transformer.h[1].register_full_backward_hook(fail_once)
    trainer.train()
    return losses.seen, trainer._train_batch_size


@pytest.mark.parametrize("stage", [2, 3])
def test_a_batch_size_is_found_as_alone(tmp_path: Path, stage: int) -> None:
    arguments = (("max_steps", 4), ("auto_find_batch_size", True), ("save_strategy", "no"))
    alone = run_ranks(out_of_memory, 2, Job(str(tmp_path), "alone", arguments=arguments))[0]
    sharded = run_ranks(out_of_memory, 2, Job(str(tmp_path), stage, arguments=arguments))[0]
    assert sharded[1] == alone[1] == 1
    assert sharded[0] == pytest.approx(alone[0], rel=1e-3)
