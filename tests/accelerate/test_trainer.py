"""transformers.Trainer: its checkpoints are ours, and a resumed run is the run that was interrupted."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, Trainer

from tests.accelerate import trainer_jobs as jobs
from tests.accelerate.trainer_jobs import Job, Seen
from tests.workers import RankFailed, run_ranks
from zero_ckpt.accelerate.trainer import attach_trainer
from zero_ckpt.core.checkpoint import Checkpoint, open_checkpoint
from zero_ckpt.errors import ConfigurationError

Stage = Any  # of attach_trainer, or "alone"
STAGES: list[tuple[int, Stage]] = [(1, None), (2, None), (2, 1), (2, 2), (2, 3)]
RESUMED = "checkpoint-6"  # in the second epoch on two processes, in the first on one


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs by (world size, stage): their folder, and what rank 0 saw."""
    made: dict[tuple[int, Stage], tuple[Path, Seen]] = {}

    def make(world_size: int, stage: Stage) -> tuple[Path, Seen]:
        if (world_size, stage) not in made:
            folder = tmp_path_factory.mktemp(f"run-{world_size}-{stage}")
            seen = run_ranks(jobs.run, world_size, Job(str(folder), stage), timeout=100)
            made[world_size, stage] = folder, seen[0]
        return made[world_size, stage]

    return make


def tensors(checkpoint: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (role, key): checkpoint.tensor(role, key)
        for role in ("model", "optim")
        for key in checkpoint.keys(role)
    }


def assert_same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage"), STAGES)
def test_resume_gives_the_same_losses(runs: Any, world_size: int, stage: Stage) -> None:
    folder, whole = runs(world_size, stage)
    job = Job(str(folder), stage, resume=str(folder / RESUMED))
    resumed = run_ranks(jobs.run, world_size, job)[0]
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 6}
    assert resumed.rate == whole.rate
    assert_same(resumed.weights, whole.weights)


@pytest.mark.parametrize("world_size", [1, 2])
def test_attached_trains_as_alone(runs: Any, world_size: int) -> None:
    assert runs(world_size, None)[1].losses == runs(world_size, "alone")[1].losses


@pytest.mark.parametrize(("world_size", "stage"), STAGES)
def test_the_folder_holds_one_committed_tag_and_the_files_of_hugging_face(
    runs: Any, world_size: int, stage: Stage
) -> None:
    folder = runs(world_size, stage)[0] / RESUMED
    states = ["rng_state.pth"] if world_size == 1 else ["rng_state_0.pth", "rng_state_1.pth"]
    assert sorted(os.listdir(folder)) == sorted(
        [
            *("config.json", "generation_config.json", "model.safetensors", "training_args.bin"),
            *("global_step6", "latest", "trainer_state.json", *states),
        ]
    )
    model = GPT2LMHeadModel.from_pretrained(folder)
    with open_checkpoint(str(folder)) as checkpoint:
        stored = {key: checkpoint.tensor("model", key) for key in checkpoint.keys("model")}
    weights = {key: value for key, value in model.state_dict().items() if key in stored}
    assert_same(weights, stored)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((2, 2), (1, None)), ((1, None), (2, 3)), ((2, 1), (2, 3)), ((2, 3), (2, 1))],
    ids=str,
)
def test_any_world_size_and_stage_resumes_any_other(
    runs: Any, tmp_path: Path, saved: tuple[int, Stage], loaded: tuple[int, Stage]
) -> None:
    folder = runs(*saved)[0] / RESUMED
    job = Job(str(tmp_path), loaded[1], resume=str(folder))
    seen = run_ranks(jobs.run_and_save_again, loaded[0], job, str(tmp_path / "again"))[0]
    assert seen.losses
    with open_checkpoint(str(folder)) as one, open_checkpoint(str(tmp_path / "again")) as other:
        assert_same(tensors(one), tensors(other))
        assert one.objects()["lr_schedulers"] == other.objects()["lr_schedulers"]


@pytest.mark.parametrize(("world_size", "stage"), [(1, None), (2, None), (2, 2)])
def test_a_folder_that_the_trainer_wrote_resumes(
    runs: Any, tmp_path: Path, world_size: int, stage: Stage
) -> None:
    folder, whole = runs(world_size, "alone")
    assert "optimizer.pt" in os.listdir(folder / RESUMED)
    job = Job(str(tmp_path), stage, resume=str(folder / RESUMED))
    seen = run_ranks(jobs.run, world_size, job)[0]
    expected = [loss for step, loss in whole.losses.items() if step > 6]
    # Of a sharded model, sums are in another order.
    assert list(seen.losses.values()) == (
        pytest.approx(expected, rel=1e-3) if stage == 2 else expected
    )


@pytest.mark.parametrize(("world_size", "stage"), [(1, None), (2, 2)])
def test_an_order_that_goes_on_from_epoch_to_epoch_is_resumed(
    tmp_path: Path, world_size: int, stage: Stage
) -> None:
    sampler = ("accelerator_config", {"use_seedable_sampler": False})
    arguments = (sampler, ("save_steps", 2), ("max_steps", 11))
    whole = run_ranks(jobs.run, world_size, Job(str(tmp_path), stage, arguments=arguments))[0]
    for done in (6, 8):  # within an epoch, and between two
        job = Job(str(tmp_path), stage, resume=f"{tmp_path}/checkpoint-{done}", arguments=arguments)
        seen = run_ranks(jobs.run, world_size, job)[0]
        assert seen.losses == {step: loss for step, loss in whole.losses.items() if step > done}


@pytest.mark.slow
def test_resume_true_takes_the_last_checkpoint_and_old_ones_are_rotated(tmp_path: Path) -> None:
    limit = (("save_total_limit", 1), ("max_steps", 7))
    run_ranks(jobs.run, 2, Job(str(tmp_path), 2, arguments=limit))
    assert os.listdir(tmp_path) == ["checkpoint-7"]
    longer = (("save_total_limit", 1), ("max_steps", 9))
    seen = run_ranks(jobs.run, 2, Job(str(tmp_path), 3, resume=True, arguments=longer))[0]
    assert list(seen.losses) == [8, 9]
    assert os.listdir(tmp_path) == ["checkpoint-9"]


@pytest.mark.slow
def test_accumulated_gradients_and_a_resume_at_an_epochs_begin(tmp_path: Path) -> None:
    arguments = (("gradient_accumulation_steps", 2), ("save_steps", 2))
    whole = run_ranks(jobs.run, 2, Job(str(tmp_path), 2, arguments=arguments))[0]
    job = Job(str(tmp_path), 2, resume=str(tmp_path / "checkpoint-2"), arguments=arguments)
    seen = run_ranks(jobs.run, 2, job)[0]
    assert seen.losses == {step: loss for step, loss in whole.losses.items() if step > 2}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_trainer_resumes_in_the_program_that_saved(
    runs: Any, tmp_path: Path, stage: Stage
) -> None:
    job = Job(str(tmp_path), stage)
    for first, again in run_ranks(jobs.train_twice, 2, job, str(tmp_path / RESUMED)):
        assert again == {step: loss for step, loss in first.items() if step > 6}


@pytest.mark.parametrize("stage", [None, 2])
def test_the_best_model_is_loaded_and_exported_at_the_end(tmp_path: Path, stage: Stage) -> None:
    arguments = (
        *jobs.keeping_best(3),
        ("save_total_limit", 1),  # so that the last is removed at the end
        ("max_steps", 6),
    )
    job = Job(str(tmp_path), stage, arguments=arguments)
    best, weights = run_ranks(jobs.best_at_end, 2, job)[0]
    assert os.listdir(tmp_path) == ["checkpoint-3"]
    exported = load_file(f"{best}/fp32/model.safetensors")
    assert_same({key: weights[key] for key in exported}, exported)
    with open_checkpoint(best) as checkpoint:
        stored = {key: checkpoint.tensor("model", key) for key in checkpoint.keys("model")}
    assert_same({key: weights[key] for key in stored}, stored)


def best_of_another_trainer(first: Job, then: Job) -> list[str]:
    """Warnings of a run that goes on from an unattached one's checkpoints, of which the first is the best."""
    jobs.run(first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = jobs.make_trainer(then)
        trainer.train(resume_from_checkpoint=then.resume)
        trainer.accelerator.end_training()
        trainer.accelerator.end_training()
    return [str(w.message) for w in caught if "exported" in str(w.message)]


def test_it_is_told_why_a_best_model_of_another_trainer_is_not_exported(tmp_path: Path) -> None:
    arguments = jobs.keeping_best(3)
    first = Job(str(tmp_path), "alone", arguments=(*arguments, ("max_steps", 6)))
    resume = str(tmp_path / "checkpoint-6")
    then = Job(str(tmp_path), 1, resume=resume, arguments=(*arguments, ("max_steps", 9)))
    told, quiet = run_ranks(best_of_another_trainer, 2, first, then)
    assert quiet == []
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path}/checkpoint-3 has no save of zero_ckpt's")
    assert "attach_trainer an export=PATH" in told[0]
    assert not list(tmp_path.rglob("fp32"))


def ended(job: Job) -> None:
    trainer, _ = jobs.make_trainer(job)
    trainer.train()
    trainer.accelerator.end_training()
    for call in (trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler):
        with pytest.raises(ConfigurationError, match="their process group is gone"):
            call(f"{job.folder}/checkpoint-1")


def test_a_trainer_saves_and_loads_nothing_after_the_end(tmp_path: Path) -> None:
    job = Job(str(tmp_path), 2, arguments=(("max_steps", 1), ("save_steps", 1)))
    run_ranks(ended, 2, job)
    with open_checkpoint(f"{tmp_path}/checkpoint-1") as checkpoint:
        assert checkpoint.manifest.world_size == 2


def test_damage_ends_the_resume(runs: Any, tmp_path: Path) -> None:
    run_ranks(jobs.run, 2, Job(str(tmp_path), 2, arguments=(("max_steps", 3),)))
    file = tmp_path / "checkpoint-3" / "global_step3" / "optim-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[4100] ^= 1
    file.write_bytes(content)
    with pytest.raises(RankFailed, match="CorruptCheckpointError"):
        run_ranks(jobs.run, 2, Job(str(tmp_path), 2, resume=True))


def test_what_is_no_trainer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="found int"):
        attach_trainer(3)


def attached_twice(job: Job) -> str:
    trainer, _ = jobs.make_trainer(job)
    assert isinstance(trainer, Trainer)
    with pytest.raises(ConfigurationError, match="attached already"):
        attach_trainer(trainer)
    return type(trainer).__name__


def test_a_trainer_is_attached_once_and_stays_a_trainer(tmp_path: Path) -> None:
    assert run_ranks(attached_twice, 1, Job(str(tmp_path))) == ["Trainer"]
