"""A Trainer in small: a tiny model made from its config, with dropout, on numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from zero_ckpt.accelerate.trainer import attach_trainer

SAMPLES = 16
WORDS = 23


@dataclass(frozen=True)
class Job:
    """A run. `stage` "alone": the Trainer is not attached."""

    folder: str
    stage: int | str | None = None
    epochs: int = 3
    resume: str | bool | None = None
    arguments: tuple[tuple[str, Any], ...] = ()


@dataclass
class Seen:
    """What a run gives: the loss of each step by its number, the rate at the end, weights and moments."""

    losses: dict[int, float]
    rate: float
    weights: dict[str, torch.Tensor]


class Sentences(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = (torch.arange(8) * (index + 1)) % WORDS
        return {"input_ids": words, "labels": words}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.seen[state.global_step] = logs["loss"]


def make_trainer(job: Job) -> tuple[Trainer, Losses]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0 if job.resume is None else 99)
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    arguments = TrainingArguments(
        output_dir=job.folder,
        num_train_epochs=job.epochs,
        per_device_train_batch_size=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        learning_rate=1e-2,
        **{
            "save_strategy": "steps",
            "save_steps": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": [],
            **dict(job.arguments),
        },
    )
    losses = Losses()
    trainer = Trainer(
        GPT2LMHeadModel(config),
        arguments,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=[losses],
    )
    if job.stage != "alone":
        attach_trainer(trainer, job.stage)
    return trainer, losses


def run(job: Job) -> Seen:
    trainer, losses = make_trainer(job)
    trainer.train(resume_from_checkpoint=job.resume)
    return _seen(trainer, losses)


def _seen(trainer: Trainer, losses: Losses) -> Seen:
    weights = trainer.accelerator.get_state_dict(trainer.model)
    return Seen(
        losses.seen,
        trainer.lr_scheduler.get_last_lr()[0],
        {key: value.detach().clone() for key, value in weights.items()},
    )


class SaveAgain(TrainerCallback):
    """Saves what was loaded to another folder, before the first step."""

    trainer: Trainer

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._save_optimizer_and_scheduler(self.folder)


def run_and_save_again(job: Job, folder: str) -> Seen:
    trainer, losses = make_trainer(job)
    again = SaveAgain(folder)
    again.trainer = trainer
    trainer.add_callback(again)
    trainer.train(resume_from_checkpoint=job.resume)
    return _seen(trainer, losses)


def train_twice(job: Job, checkpoint: str) -> tuple[dict[int, float], dict[int, float]]:
    """In one program: to the end, and then again from a checkpoint."""
    trainer, losses = make_trainer(job)
    trainer.train()
    first, losses.seen = losses.seen, {}
    trainer.train(resume_from_checkpoint=checkpoint)
    return first, losses.seen


def best_at_end(job: Job) -> tuple[str, dict[str, torch.Tensor]]:
    """The folder of the best checkpoint, and the weights that the trainer ends with, which are exported."""
    trainer, losses = make_trainer(job)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    weights = _seen(trainer, losses).weights
    trainer.accelerator.end_training()
    return trainer.state.best_model_checkpoint, weights


def keeping_best(steps: int) -> tuple[tuple[str, Any], ...]:
    """Arguments of a Trainer that is evaluated every so many steps, and ends with the first of these models."""
    return (
        ("eval_strategy", "steps"),
        ("eval_steps", steps),
        ("load_best_model_at_end", True),
        ("metric_for_best_model", "eval_loss"),
        ("greater_is_better", True),  # so that the first is the best
    )
