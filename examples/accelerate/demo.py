"""What `make demo-accelerate` runs: train on 2 processes, kill one, resume on 1, use the result."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # both demos are made of the same parts

from shared.demo import (
    Training,
    act,
    arguments_of,
    follow_resumed,
    kill_half_way,
    run_demo,
    show_folder,
    use_the_weights,
)

SCRIPT = Path(__file__).resolve().with_name("train.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def acts(out: Path, steps: int) -> None:
    act(1, "Train a small GPT on Python's own source text: 2 processes, ZeRO stage 3")
    with train(out / "first-run.log", 2, *arguments_of(out, steps)) as killed:
        kill_half_way(killed, steps)
    act(3, "Resume from the newest checkpoint, now on 1 process")
    again = [*arguments_of(out, steps), "--resume"]
    with train(out / "second-run.log", 1, *again) as resumed:
        follow_resumed(resumed, steps, killed)
    act(4, "What is on disk")
    folder = out / "checkpoints"
    tags = sorted(folder.glob("global_step*"), key=lambda tag: int(tag.name[len("global_step") :]))
    show_folder(folder, tags, [tags[0], tags[-1], folder / "fp32"])
    act(5, "The fp32 export in plain PyTorch: no Accelerate, no sharding, no process group")
    use_the_weights(folder / "fp32" / "model.safetensors")


def train(log: Path, processes: int, *arguments: str) -> Training:
    told = ["--stage", "3", *arguments]
    several = processes > 1
    launcher = f"torchrun --nproc-per-node {processes}" if several else "python"
    shown = " ".join([launcher, "examples/accelerate/train.py", *told])
    command = [sys.executable, *([*TORCHRUN, str(processes)] if several else []), str(SCRIPT)]
    return Training([*command, *told], shown, log, has_launcher=several)


if __name__ == "__main__":
    sys.exit(run_demo((__doc__ or "").splitlines()[0], "runs/demo-accelerate", acts))
