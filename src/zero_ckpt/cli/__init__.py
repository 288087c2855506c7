"""The `zero-ckpt` command: `ls`, `inspect`, `verify`, `export`. Only `export` imports torch."""

from zero_ckpt.cli.program import main

__all__ = ["main"]
