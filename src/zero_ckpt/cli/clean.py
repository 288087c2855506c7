"""`zero-ckpt clean DIR`: what saves that never committed have left, and its removal."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from zero_ckpt.cli.text import json_text, plural, printable, size_text
from zero_ckpt.core.leftovers import Leftover, find_leftovers, remove_leftovers
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.core.tag_folder import is_tag_folder
from zero_ckpt.errors import CheckpointNotFoundError

SUMMARY = "remove what killed saves have left"
DESCRIPTION = """\
Lists the files of saves that were killed before they committed: shard files that no manifest lists. With --yes it
removes them, and folders that are empty then. What 'repair' can make a checkpoint of stays, and so does whatever no
save has written. Run it when no job saves there: without --yes the files of a save that is under way are listed, too;
with --yes it refuses while a job saves, and a save that begins meanwhile is refused."""
EXAMPLES = """\
  zero-ckpt clean checkpoints
  zero-ckpt clean checkpoints --yes"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", help="checkpoint directory")
    parser.add_argument("--yes", action="store_true", help="remove what is listed")


def run(options: argparse.Namespace) -> int:
    storage, directory = AnyStorage(), absolute(options.path)
    if is_tag_folder(storage, directory):
        raise CheckpointNotFoundError(
            f"{options.path}: one checkpoint, not a directory of them: use 'zero-ckpt clean "
            f"{os.path.dirname(directory)}'"
        )
    act = remove_leftovers if options.yes else find_leftovers
    found = act(storage, directory)
    if options.json:
        print(json_text(_document(directory, found, options.yes)))
        return 0
    for leftover in found:
        print(printable(f"{os.path.join(options.path, leftover.tag)}: {_told(leftover)}"))
    print(printable(_summary(options.path, _removable(found), options.yes)))
    return 0


def _removable(found: Sequence[Leftover]) -> list[Leftover]:
    return [leftover for leftover in found if not leftover.kept]


def _told(leftover: Leftover) -> str:
    what = f"{plural(len(leftover.files), 'file')}, {size_text(leftover.nbytes)}"
    if leftover.is_committed:
        return f"committed; {what} of a save that did not commit"
    return f"not committed, {what}" + (f"; stays: {leftover.kept}" if leftover.kept else "")


def _summary(path: str, removable: Sequence[Leftover], removed: bool) -> str:
    if not removable:
        return f"{path}: nothing to remove"
    count = plural(sum(len(leftover.files) for leftover in removable), "file")
    size = size_text(sum(leftover.nbytes for leftover in removable))
    if removed:
        return f"{path}: removed {count}, {size}"
    return f"{path}: nothing was removed; with --yes {count}, {size}"


def _document(directory: str, found: Sequence[Leftover], removed: bool) -> dict[str, object]:
    return {
        "directory": directory,
        "leftovers": [
            {
                "tag": leftover.tag,
                "committed": leftover.is_committed,
                "files": list(leftover.files),
                "nbytes": leftover.nbytes,
                "kept": leftover.kept or None,
                "removed": removed and not leftover.kept,
            }
            for leftover in found
        ],
    }
