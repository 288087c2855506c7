"""A byte-level mixture of experts, spread over ranks, in a plain PyTorch loop.

    torchrun --nproc-per-node 2 examples/moe/train.py                      # two experts per rank
    torchrun --nproc-per-node 4 examples/moe/train.py --resume             # one per rank,
    torchrun --nproc-per-node 4 examples/moe/train.py --resume --parts 2   # two, each on two ranks,
    python examples/moe/train.py --resume                                  # or all in one process

What is special to zero_ckpt: `declare_experts`, the ZeRO stage, and the Checkpointer.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from zero_ckpt import Checkpointer, zero

sys.path.append(str(Path(__file__).resolve().parent))

from model import moe_gpt
from shared.gpt import loss_of
from shared.text import training_windows

CONTEXT, BATCH = 64, 16


def main() -> None:
    args = parse_arguments()
    start_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts = args.parts or world_size
    shape = (world_size // parts, parts)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("expert_data", "expert"))

    model = moe_gpt(args.experts, mesh["expert"])
    zero.declare_experts(model, [block.mlp.experts for block in model.blocks], mesh)
    zero.shard_module(model, stage=args.stage, mesh=zero.make_mesh(world_size, None, "cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    checkpointer = Checkpointer(model, optimizer, zero_stage=args.stage, rng=False)

    checkpoints = args.out / "checkpoints"
    if args.resume is not None:
        checkpointer.load_checkpoint(checkpoints, args.resume or None)
    step = checkpointer.global_step
    print(f"rank {rank} of {world_size}: process {os.getpid()}, step {step}\n", end="", flush=True)
    windows = training_windows(CONTEXT)
    while step < args.steps:
        loss = loss_of(model, batch_of(windows, step, rank, world_size))
        loss.backward()
        zero.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step = checkpointer.global_step
        if step == 1 or step % args.log_every == 0:
            print_loss(step, loss)
        if step % args.checkpoint_every == 0:
            checkpointer.save_checkpoint(checkpoints)
    dist.destroy_process_group()


def start_process_group() -> None:
    """As torchrun says, or this process alone."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def batch_of(
    windows: torch.utils.data.Dataset[torch.Tensor], step: int, rank: int, world_size: int
) -> torch.Tensor:
    """This rank's part of a step's batch, which is the same at any world size."""
    chance = torch.Generator().manual_seed(step)
    chosen = torch.randint(len(windows), (BATCH,), generator=chance)  # type: ignore[arg-type]
    return torch.stack([windows[int(i)] for i in chosen.tensor_split(world_size)[rank]])


def print_loss(step: int, loss: torch.Tensor) -> None:
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print(f"step {step}  loss {mean.item() / dist.get_world_size():.6f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--experts", type=int, default=4, help="of each layer (default: 4)")
    add("--parts", type=int, default=0, help="ranks that share a layer's experts (default: all)")
    add("--stage", type=int, default=2, choices=(2, 3), help="ZeRO stage (default: 2)")
    add("--steps", type=int, default=60, help="optimizer steps in all (default: 60)")
    add("--checkpoint-every", type=int, default=20, metavar="STEPS", help="(default: 20)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="(default: 10)")
    add("--out", type=Path, default=Path("runs/moe"), help="(default: runs/moe)")
    add("--resume", nargs="?", const="", metavar="TAG", help="go on from it, or from the newest")
    return parser.parse_args()


if __name__ == "__main__":
    main()
