"""What `make demo` runs: train sharded, kill a rank, resume as another ZeRO stage, use the result."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # demos are made of the same parts

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
FIRST_STAGE, SECOND_STAGE = 3, 1


def acts(out: Path, steps: int) -> None:
    act(1, f"Train a small GPT on Python's own source text: 2 processes, ZeRO stage {FIRST_STAGE}")
    with train(out / "first-run.log", FIRST_STAGE, *arguments_of(out, steps)) as killed:
        kill_half_way(killed, steps)
    act(3, f"Resume from the newest checkpoint, now as ZeRO stage {SECOND_STAGE}")
    again = [*arguments_of(out, steps), "--resume"]
    with train(out / "second-run.log", SECOND_STAGE, *again) as resumed:
        follow_resumed(resumed, steps, killed)
    act(4, "What is on disk")
    folder = out / "checkpoints"
    tags = sorted(folder.glob("step=*"), key=lambda tag: int(tag.stem.removeprefix("step=")))
    show_folder(folder, tags, [tags[-1], folder / "fp32"])
    act(5, "The fp32 export in plain PyTorch: no strategy, no sharding, no process group")
    use_the_weights(folder / "fp32" / "model.safetensors", prefix="gpt.")


def train(log: Path, stage: int, *arguments: str) -> Training:
    told = ["--stage", str(stage), *arguments]
    shown = " ".join(["python examples/lightning/train.py", *told])
    return Training([sys.executable, str(SCRIPT), *told], shown, log)


if __name__ == "__main__":
    sys.exit(run_demo((__doc__ or "").splitlines()[0], "runs/demo", acts))
