"""What is known of the cases: their names, tags and true values."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.interop.conftest import DATA

with tarfile.open(DATA) as _archive:
    NAMES = sorted({name.partition("/")[0] for name in _archive.getnames()})

UNNAMED = {"pipe_tied_z0_w2_pp2": {"tied_modules.embed.emb.weight": "0.emb.weight"}}
"""Names that the files do not hold: stage 0 does not record what a tied layer's key was."""

RECORDED_LATER = {"pipe_tied_z0_w2_pp2"}
"""Cases whose optimizer state was recorded after two more steps: its shapes are right, its values are not."""


@dataclass(frozen=True)
class Case:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def directory(self) -> Path:
        return next(d for d in (self.folder / "ckpt", self.folder / "ckpt.ckpt") if d.is_dir())

    @property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
        return meta

    @property
    def tag(self) -> str:
        """The tag whose values are known."""
        return str(self.meta["main_tag"])

    @property
    def tags(self) -> list[str]:
        """That one, and its universal conversion."""
        universal = self.directory / "latest_universal"
        return [self.tag, universal.read_text()] if universal.exists() else [self.tag]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The true fp32 state dict, under the names that the files have."""
        left_out = "expected_fp32_exclfrozen.safetensors"
        name = left_out if "excl" in self.name else "expected_full_fp32.safetensors"
        return self._renamed(load_file(self.folder / name))

    @property
    def after_two_steps(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected_after2_fp32.safetensors")

    @property
    def optimizer(self) -> dict[str, Any]:
        """`state`: name -> parameter -> tensor; `step`: its values; `trainable`: names, where they are recorded."""
        found: dict[str, Any] = torch.load(self.folder / "expected_optim.pt", weights_only=True)
        return {**found, "state": {k: self._renamed(v) for k, v in found["state"].items()}}

    def _renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        names = UNNAMED.get(self.name, {})
        return {names.get(name, name): value for name, value in values.items()}
