"""What `make demo-moe` runs: experts on 2 ranks, resumed on 4 and on 1, and their fp32 weights."""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # demos are made of the same parts

from shared.demo import (
    TOLERANCE,
    DemoFailed,
    Training,
    act,
    arguments_of,
    compared,
    run_demo,
    say,
    show_folder,
)

SCRIPT = Path(__file__).resolve().with_name("train.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def acts(out: Path, steps: int) -> None:
    act(1, "Train a mixture of 4 experts per layer: 2 processes, two experts on each")
    first = train(out / "first-run.log", 2, steps, *arguments_of(out, steps))
    tag = f"global_step{steps // 3}"
    again = [*arguments_of(out, steps, checkpoint_every=2 * steps), "--resume", tag]
    act(2, f"Resume from {tag} on 4 processes, one expert on each")
    compare(train(out / "second-run.log", 4, steps, *again), first)
    act(3, "The same on 1 process, which has all experts")
    compare(train(out / "second-run.log", 1, steps, *again), first)
    act(4, "What is on disk: each expert once, under its number in the layer")
    show(out / "checkpoints")
    act(5, "The fp32 weights of all experts in the plain model")
    use_the_weights(out / "checkpoints")


def train(log: Path, processes: int, steps: int, *arguments: str) -> Training:
    """Run to the end; losses are printed as they come."""
    several = processes > 1
    launcher = f"torchrun --nproc-per-node {processes}" if several else "python"
    shown = " ".join([launcher, "examples/moe/train.py", *arguments])
    command = [sys.executable, *([*TORCHRUN, str(processes)] if several else []), str(SCRIPT)]
    with Training([*command, *arguments], shown, log, has_launcher=several) as training:
        for step in training.steps():
            if step == 1 or step % (steps // 6) == 0:
                say(f"step {step:3}   loss {training.losses[step]:.4f}")
        code = training.exit_code()
    if code != 0 or steps not in training.losses:
        raise DemoFailed(f"the training ended before step {steps}, with exit code {code}")
    return training


def compare(resumed: Training, first: Training) -> None:
    both = sorted(first.losses.keys() & resumed.losses.keys())
    if resumed.first_step == 0 or not both:
        raise DemoFailed(f"resumed at step {resumed.first_step}: no step to compare")
    apart = max(abs(first.losses[step] / resumed.losses[step] - 1) for step in both)
    if apart > TOLERANCE:
        raise DemoFailed(f"losses on 2 processes and after the resume differ by {apart:.1e}")
    say(f"resumed at step {resumed.first_step}; its losses and those of act 1 {compared(apart)}")


def show(folder: Path) -> None:
    from zero_ckpt.core.checkpoint import open_checkpoint

    tags = sorted(folder.glob("global_step*"), key=lambda tag: int(tag.name[len("global_step") :]))
    show_folder(folder, tags, [tags[-1]])
    with open_checkpoint(folder) as checkpoint:
        names = [key for key in checkpoint.keys("model") if key.endswith("mlp.experts.3.0.weight")]
    say(f"among its tensors: {', '.join(names)}")


def use_the_weights(folder: Path) -> None:
    import torch

    from model import moe_gpt
    from shared.gpt import loss_of
    from shared.text import held_out_windows
    from zero_ckpt import get_fp32_state_dict_from_zero_checkpoint

    gpt = moe_gpt(experts=4)
    weights = get_fp32_state_dict_from_zero_checkpoint(folder)
    say(f"load_state_dict(..., strict=True): {gpt.load_state_dict(weights, strict=True)}")
    guess = math.log(256)
    with torch.no_grad():
        loss = loss_of(gpt, held_out_windows(64)[::20]).item()
    say(f"loss on text that it never saw: {loss:.3f} nats per byte (a blind guess: {guess:.3f})")
    if loss > 0.75 * guess:
        raise DemoFailed("the weights are not those of a model that has learned")


if __name__ == "__main__":
    sys.exit(run_demo((__doc__ or "").splitlines()[0], "runs/demo-moe", acts))
