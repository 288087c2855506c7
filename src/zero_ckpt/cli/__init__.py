"""The `zero-ckpt` command: `ls`, `inspect`, `verify`, `export`, `convert`. Only the last two import torch."""

from zero_ckpt.cli.program import main

__all__ = ["main"]
