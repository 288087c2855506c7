"""The example's data: the source text of Python's own standard library, as windows of bytes.

An ordinary `Dataset` and an ordinary shuffling `DataLoader`: Lightning gives each rank its share,
and zero_ckpt continues them in the middle of an epoch.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

HELD_OUT_BYTES = 100_000  # at the end of the text, never trained on


@cache
def standard_library_text() -> torch.Tensor:
    """Return the modules of the running Python's standard library as one (bytes,) uint8 tensor."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if len(text) < 10 * HELD_OUT_BYTES:
        raise FileNotFoundError(
            f"{folder}: {10 * HELD_OUT_BYTES} bytes of Python source expected, {len(text)} found. "
            "Run the example with a Python that has its standard library as .py files."
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Windows(Dataset[torch.Tensor]):
    """All windows of a (bytes,) text, side by side: each (context + 1,) int64."""

    def __init__(self, text: torch.Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.context
        return self.text[start : start + self.context + 1].long()


class StandardLibrary(L.LightningDataModule):
    """Windows of `context` bytes, `batch_size` of them per step and rank."""

    def __init__(self, batch_size: int = 8, context: int = 128) -> None:
        super().__init__()
        self.batch_size, self.context = batch_size, context

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        windows = Windows(standard_library_text()[:-HELD_OUT_BYTES], self.context)
        return DataLoader(windows, self.batch_size, shuffle=True)

    def held_out(self) -> torch.Tensor:
        """Return the text that no training step sees: (windows, context + 1) int64."""
        windows = Windows(standard_library_text()[-HELD_OUT_BYTES:], self.context)
        return torch.stack([windows[index] for index in range(len(windows))])
