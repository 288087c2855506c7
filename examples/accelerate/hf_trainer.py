"""transformers.Trainer: a tiny GPT-2, made from its config, learns to count; zero_ckpt shards it and checkpoints it.

    torchrun --nproc-per-node 2 examples/accelerate/hf_trainer.py                     # ZeRO stage 2
    torchrun --nproc-per-node 2 examples/accelerate/hf_trainer.py --resume --stage 3  # another stage,
    python examples/accelerate/hf_trainer.py --resume --steps 120                     # or one process

What is special to zero_ckpt: the import, and `attach_trainer` before `train`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from zero_ckpt.accelerate.trainer import attach_trainer

NUMBERS = 64


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sentence i counts in steps of i, modulo 64."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = torch.arange(32) * (index % 16 + 1) % NUMBERS
        return {"input_ids": words, "labels": words}


def main() -> None:
    args = parse_arguments()
    set_seed(0)
    config = GPT2Config(
        vocab_size=NUMBERS,
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    arguments = TrainingArguments(
        output_dir=str(args.out),
        use_cpu=args.cpu,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=10,
        save_steps=20,
        disable_tqdm=True,
        report_to=[],
    )
    model = GPT2LMHeadModel(config)
    trainer = Trainer(model, arguments, train_dataset=Counting())
    attach_trainer(trainer, stage=args.stage)
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.accelerator.end_training()  # the last checkpoint's fp32 weights


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--stage", type=int, default=2, choices=range(4), help="ZeRO stage (default: 2)")
    add("--steps", type=int, default=80, help="optimizer steps in all (default: 80)")
    add("--out", type=Path, default=Path("runs/trainer"), help="(default: runs/trainer)")
    add("--cpu", action=argparse.BooleanOptionalAction, default=True, help="train on the CPU")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
