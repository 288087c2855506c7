"""Accelerate's script of saving and resuming over processes, as tests that run it with torchrun.

`accelerate.test_utils.scripts.external_deps.test_checkpointing` trains an epoch and saves; started again
with `--resume_from_checkpoint` it asserts that accuracy, learning rates and epoch are those of the save.
Accelerate starts it on GPUs only; here it runs on the CPU, in 2 processes and resumed in 2 and in 1. Its
`main` runs as it is, but for `get_dataloaders`, which asks the hub: as in Accelerate's examples under
test, `mocked_dataloaders` takes its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def start(processes: int, folder: Path, *arguments: str) -> str:
    """Run the script with torchrun and return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", __file__, f"--output_dir={folder}", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    start(2, folder, "--partial_train_epoch=1")
    return folder


def test_an_epoch_of_two_processes_is_saved(saved: Path) -> None:
    assert (saved / "state_0.json").is_file()
    ours = (saved / "epoch_0" / "latest").is_file()
    assert ours == bool(os.environ.get("PEER_ATTACH"))


@pytest.mark.parametrize("processes", [2, 1])
def test_it_is_resumed(saved: Path, processes: int) -> None:
    printed = start(processes, saved, f"--resume_from_checkpoint={saved / 'epoch_0'}")
    assert "resumed checkpoint performance:" in printed


def main() -> None:
    from accelerate.test_utils.scripts.external_deps import test_checkpointing as script
    from accelerate.test_utils.training import mocked_dataloaders

    script.get_dataloaders = lambda accelerator, batch_size, _: mocked_dataloaders(
        accelerator, batch_size
    )
    script.main()


if __name__ == "__main__":
    main()
