"""Removing checkpoints. Imports no torch.

Owns the order of removals. Promises: a crash in the midst of one leaves garbage, never a torn checkpoint; retention
counts and removes committed checkpoints of this format alone, and never what `latest` names.
"""

from __future__ import annotations

import contextlib

from zero_ckpt.core.finding import TagInfo, list_tags
from zero_ckpt.core.foreign import format_of
from zero_ckpt.core.manifest import MANIFEST_NAME
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import names_in
from zero_ckpt.core.tags import read_latest

__all__ = ["prune", "remove_tag"]


def remove_tag(storage: Storage, directory: str, tag: str) -> None:
    """Remove a checkpoint: first the manifest, durably, so that a crash leaves garbage, never a torn checkpoint.

    Of a link to a checkpoint only the link is removed.
    """
    folder = f"{directory}/{tag}"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if any(entry.name == tag and entry.is_dir for entry in storage.list(directory)):
            storage.remove(f"{folder}/{MANIFEST_NAME}")
            storage.sync(folder)
        storage.remove(folder)
        storage.sync(directory)


def prune(storage: Storage, directory: str, keep_last: int, protected: str) -> list[str]:
    """Remove the oldest committed checkpoints beyond `keep_last`; never `protected`, nor what `latest` names.

    Checkpoints of other systems, and folders that hold one beside ours, neither count nor are removed.
    """
    infos = [info for info in list_tags(storage, directory) if _is_ours(storage, directory, info)]
    spared = {protected, read_latest(storage, directory)}
    doomed = [
        info.name for info in infos[: max(0, len(infos) - keep_last)] if info.name not in spared
    ]
    for name in doomed:
        remove_tag(storage, directory, name)
    return doomed


def _is_ours(storage: Storage, directory: str, info: TagInfo) -> bool:
    return (
        info.summary is not None
        and format_of(names_in(storage, f"{directory}/{info.name}")) is None
    )
