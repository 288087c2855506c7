"""The same byte-level GPT as a plain Accelerate loop, with `zero_ckpt.Checkpointer` doing the checkpoints.

    torchrun --nproc-per-node 2 examples/accelerate/train.py
    torchrun --nproc-per-node 2 examples/accelerate/train.py --resume           # goes on from the newest
    python examples/accelerate/train.py --resume                                # ... in one process
    python -m zero_ckpt export runs/accelerate/checkpoints gpt.safetensors      # the fp32 weights

`--no-cpu` uses the GPUs that there are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import zero_ckpt

sys.path.append(str(Path(__file__).parents[1] / "lightning"))  # the model and the data are shared

from data import HELD_OUT_BYTES, Windows, standard_library_text
from model import GPT, loss_of


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(cpu=args.cpu)
    set_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, gamma=0.7)
    windows = Windows(standard_library_text()[:-HELD_OUT_BYTES], context=128)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(windows, batch_size=8, shuffle=True)
    )
    checkpointer = zero_ckpt.Checkpointer(model, optimizer.optimizer, scheduler, keep_last=2)
    step = 0
    if args.resume:
        path, state = checkpointer.load_checkpoint(args.out / "checkpoints")
        step = state["step"]
        accelerator.print(f"resumed from {path}")
    epoch, done = divmod(step, len(loader))
    loader.set_epoch(epoch)
    for batch in accelerator.skip_first_batches(loader, done):
        if step == args.steps:
            break
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            mean = accelerator.reduce(loss.detach(), "mean")
            accelerator.print(f"step {step}  loss {mean:.4f}")
        if step % args.checkpoint_every == 0:
            checkpointer.save_checkpoint(args.out / "checkpoints", client_state={"step": step})
    accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=100, help="optimizer steps in all (default: 100)")
    add("--checkpoint-every", type=int, default=20, metavar="STEPS", help="(default: 20)")
    add("--out", type=Path, default=Path("runs/accelerate"), help="(default: runs/accelerate)")
    add("--cpu", action=argparse.BooleanOptionalAction, default=True, help="train on the CPU")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
