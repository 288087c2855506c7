"""Ranks that Accelerate's own launchers fork, as from a notebook."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zero_ckpt.core.checkpoint import open_checkpoint

OF_A_LAUNCH = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Variables that tests of accelerators in this process may leave, and that make a rank of the program."""


@pytest.mark.parametrize("launcher", ["debug_launcher", "notebook_launcher"])
def test_forked_ranks_save_load_and_end_together(tmp_path: Path, launcher: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCH}
    command = [sys.executable, "-m", "tests.accelerate.launched", launcher, str(tmp_path)]
    with subprocess.Popen(
        command,
        env={**inherited, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            output, _ = program.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 0, output
    assert output.endswith("all is well\n")
    for stage in (None, 1, 3):
        with open_checkpoint(tmp_path / str(stage)) as checkpoint:
            assert checkpoint.manifest.world_size == 2
    assert (tmp_path / "3" / "fp32" / "model.safetensors").is_file()
