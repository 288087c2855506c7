"""The examples' data: the source text of Python's own standard library, as windows of bytes."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import Dataset

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


def held_out_windows(context: int) -> torch.Tensor:
    """Return the text that no training step sees: (windows, context + 1) int64."""
    windows = Windows(standard_library_text()[-HELD_OUT_BYTES:], context)
    return torch.stack([windows[index] for index in range(len(windows))])


def training_windows(context: int) -> Windows:
    return Windows(standard_library_text()[:-HELD_OUT_BYTES], context)
