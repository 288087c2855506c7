"""Train a small byte-level GPT on Python's own source text, with ZeRO-sharded checkpoints.

    python examples/lightning/train.py                          # 2 processes on the CPU, stage 3
    python examples/lightning/train.py --resume                 # go on from the newest checkpoint,
    python examples/lightning/train.py --resume --stage 1       # with another ZeRO stage,
    python examples/lightning/train.py --resume --devices 1     # or another number of processes
    python examples/lightning/train.py --accelerator gpu --devices 8

What is special to zero_ckpt: the import, and the one line that makes the strategy.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import zero_ckpt.lightning

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the model and the data are shared

from data import StandardLibrary
from model import LitGPT


def main() -> None:
    args = parse_arguments()
    L.seed_everything(args.seed, verbose=False)
    trainer = L.Trainer(
        strategy=zero_ckpt.lightning.ZeroStrategy(stage=args.stage),
        accelerator=args.accelerator,
        devices=args.devices,
        precision=args.precision,
        max_steps=args.steps,
        gradient_clip_val=1.0,
        callbacks=[
            PrintProgress(args.log_every),
            ModelCheckpoint(
                dirpath=args.out / "checkpoints",
                filename="{step}",
                every_n_train_steps=args.checkpoint_every,
                save_top_k=-1,
                save_last="link",
                enable_version_counter=False,
            ),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitGPT(), StandardLibrary(), ckpt_path=args.resume)


class PrintProgress(Callback):
    """Prints where the run starts, then step and loss every few steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        rank, world_size = trainer.global_rank, trainer.world_size
        # One write with its line feed: ranks share a stream, and under PYTHONUNBUFFERED `end` is another write.
        text = f"rank {rank} of {world_size}: process {os.getpid()}, step {trainer.global_step}\n"
        print(text, end="", flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and (step == 1 or step % self.every == 0):
            print(f"step {step}  loss {trainer.callback_metrics['loss']:.6f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, choices=range(4), help="ZeRO stage (default: 3)")
    add("--steps", type=int, default=300, help="optimizer steps in all (default: 300)")
    add("--devices", type=int, default=2, help="processes, or GPUs (default: 2)")
    add("--accelerator", default="cpu", help="cpu or gpu (default: cpu)")
    add("--precision", default="32-true", help="32-true, bf16-mixed, ... (default: 32-true)")
    add("--out", type=Path, default=Path("runs/gpt"), help="output folder (default: runs/gpt)")
    add("--checkpoint-every", type=int, default=100, metavar="STEPS", help="(default: 100)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="(default: 10)")
    add("--seed", type=int, default=0, help="of the initial weights (default: 0)")
    add("--resume", nargs="?", const="last", metavar="CHECKPOINT",
        help="go on from this checkpoint, or the newest one of this checkpoint directory; "
        "without a value: from the newest one in the output folder")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
