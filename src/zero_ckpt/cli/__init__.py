"""The `zero-ckpt` command: `ls`, `inspect`, `verify`, `repair`, `export`, `convert`. The last two import torch."""

from zero_ckpt.cli.program import main

__all__ = ["main"]
