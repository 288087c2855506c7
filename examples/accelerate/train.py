"""The byte-level GPT as a plain Accelerate loop; zero_ckpt shards it and does the checkpoints.

    torchrun --nproc-per-node 2 examples/accelerate/train.py                     # ZeRO stage 2
    torchrun --nproc-per-node 2 examples/accelerate/train.py --resume --stage 3  # as another stage,
    python examples/accelerate/train.py --resume                                 # or in one process

What is special to zero_ckpt: the import, and `attach` around the Accelerator. `--no-cpu` uses the
GPUs that there are.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

from zero_ckpt.accelerate import attach

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the model and the data are shared

from shared.gpt import GPT, loss_of
from shared.text import training_windows


def main() -> None:
    args = parse_arguments()
    # A batch is split over the ranks, so a step sees the same data at any world size.
    data = DataLoaderConfiguration(split_batches=True)
    accelerator = attach(Accelerator(cpu=args.cpu, dataloader_config=data), stage=args.stage)
    set_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, gamma=0.8)
    loader = DataLoader(training_windows(context=128), batch_size=16, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    checkpoints, step = args.out / "checkpoints", 0
    if args.resume:
        step = accelerator.load_state(checkpoints)["step"]
    rank, world_size = accelerator.process_index, accelerator.num_processes
    print(f"rank {rank} of {world_size}: process {os.getpid()}, step {step}\n", end="", flush=True)
    while step < args.steps:
        done = step % len(loader)  # batches of this epoch that an earlier run has used
        for batch in accelerator.skip_first_batches(loader, done) if done else loader:
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step == 1 or step % args.log_every == 0:
                mean = accelerator.reduce(loss.detach(), "mean")
                accelerator.print(f"step {step}  loss {mean:.6f}", flush=True)
            if step % args.checkpoint_every == 0 or step == args.steps:
                accelerator.save_state(checkpoints, client_state={"step": step})
            if step == args.steps:
                break
    accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--stage", type=int, default=2, choices=range(4), help="ZeRO stage (default: 2)")
    add("--steps", type=int, default=300, help="optimizer steps in all (default: 300)")
    add("--checkpoint-every", type=int, default=100, metavar="STEPS", help="(default: 100)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="(default: 10)")
    add("--out", type=Path, default=Path("runs/accelerate"), help="(default: runs/accelerate)")
    add("--cpu", action=argparse.BooleanOptionalAction, default=True, help="train on the CPU")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
