"""Checkpoints of other systems, opened as if they were ours. Nothing here needs the other system installed.

A format says which folders are its own, and describes one in our terms (see `zero_ckpt.core.foreign`). From there on
the folder is a `Checkpoint` like any other: listed, inspected, collapsed, exported and loaded by the same code.
"""
