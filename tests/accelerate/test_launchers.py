"""Ranks that Accelerate's own launchers fork, as from a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import run_program
from zero_ckpt.core.checkpoint import open_checkpoint


@pytest.mark.parametrize("launcher", ["debug_launcher", "notebook_launcher"])
def test_forked_ranks_save_load_and_end_together(tmp_path: Path, launcher: str) -> None:
    arguments = launcher, str(tmp_path)
    output = run_program("tests.accelerate.launched", *arguments, ACCELERATE_USE_CPU="true")
    assert output.endswith("all is well\n")
    for stage in (None, 1, 3):
        with open_checkpoint(tmp_path / str(stage)) as checkpoint:
            assert checkpoint.manifest.world_size == 2
    assert (tmp_path / "3" / "fp32" / "model.safetensors").is_file()
