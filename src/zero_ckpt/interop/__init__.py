"""Checkpoints of other systems, opened as if they were ours. Nothing here needs the other system installed.

A format registers how it recognises a tag's folder (see `zero_ckpt.core.foreign`). From there on the folder is a
`Checkpoint` like any other: it is listed, inspected, collapsed, exported and loaded by the same code.
"""
