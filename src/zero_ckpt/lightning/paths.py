"""Checkpoint paths as Lightning gives them: `<checkpoint directory>/<tag>`.

Also what makes a name safe to write to or to remove where files and symbolic links of earlier runs
may lie: `last.ckpt` may be a folder of ours, a link to one, or a plain file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.finding import list_tags
from zero_ckpt.core.latest import move_latest, remove_latest
from zero_ckpt.core.places import AnyStorage, absolute, is_url
from zero_ckpt.core.retention import remove_tag
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import file_instead, is_tag_folder
from zero_ckpt.core.tags import LATEST_NAME, check_tag, read_latest
from zero_ckpt.errors import CheckpointNotFoundError, ConfigurationError

__all__ = ["is_checkpoint_folder", "making_way", "refuse_export", "remove", "split"]


def split(path: Any) -> tuple[str, str]:
    """(checkpoint directory, tag). Raises `ConfigurationError` for an unfit tag."""
    directory, tag = os.path.split(absolute(path))
    return directory, check_tag(tag)


def is_checkpoint_folder(path: Any) -> bool:
    """Whether `path` is to be read as sharded: a folder, not a file that Lightning wrote."""
    place = absolute(path)
    if not is_url(place):
        return os.path.isdir(place)
    with suppress(OSError):
        AnyStorage().list(place)
        return True
    return False


def refuse_export(path: Any) -> None:
    """Raise `ConfigurationError` for a file of weights alone, which was exported from a checkpoint.

    Raises `CheckpointNotFoundError`, naming the folder, for a file that lies in a checkpoint's folder.
    """
    place = absolute(path)
    storage = AnyStorage()
    if os.path.basename(place) == LATEST_NAME or is_tag_folder(storage, os.path.dirname(place)):
        raise file_instead(storage, place, "a checkpoint's folder")
    if place.endswith((".safetensors", ".safetensors.index.json")):
        raise ConfigurationError(
            f"{place} is an export of weights alone, no checkpoint. Give the checkpoint's folder (ckpt_path, or "
            "load_module() for the module in one process), or load these weights yourself: "
            "module.load_state_dict(safetensors.torch.load_file(path))."
        )


@contextmanager
def making_way(engine: SyncEngine, directory: str, tag: str) -> Iterator[Callable[[], None]]:
    """Around a save of `engine` to this tag: moves out of the way what has its name, and back if nothing is committed.

    Yields the function that makes way. The save calls it when it begins: earlier, the failure of a previous save might
    not be known yet. The save may be committed after this has ended.
    """
    ends: list[Callable[[bool], None]] = []

    def make_way() -> None:
        ends.append(_make_way(directory, tag))
        if engine.is_async:  # `ModelCheckpoint` looks for the path before the commit
            os.makedirs(f"{directory}/{tag}", exist_ok=True)

    try:
        yield make_way
    except BaseException:
        for end in ends:
            end(False)
        raise
    for end in ends:
        engine.after_saves(end)


def _make_way(directory: str, tag: str) -> Callable[[bool], None]:
    """Before a save to this tag: remove a link of its name (the target stays), set a file of its name aside.

    Returns a function to call with the save's outcome: after a commit it removes the file, else it puts it back.
    """
    path = f"{directory}/{tag}"
    aside = f"{path}.replaced"  # no name that Lightning looks for
    if os.path.islink(path):
        os.unlink(path)
    had_file = os.path.isfile(path)
    if had_file:
        os.replace(path, aside)

    def end(committed: bool) -> None:
        if had_file and committed:
            os.unlink(aside)
        elif had_file:
            shutil.rmtree(path, ignore_errors=True)
            os.replace(aside, path)
        elif not committed:
            with suppress(OSError):
                os.rmdir(path)  # if nothing is in it

    return end


def remove(path: Any) -> None:
    """Remove a checkpoint of any kind: a folder, a link or a file. A missing one is fine.

    Links beside it that point to it, and `latest`, are first pointed to the newest remaining
    checkpoint, so that `last.ckpt` never dangles; without another one they go too.
    """
    storage = AnyStorage()
    directory, tag = split(path)
    target = f"{directory}/{tag}"
    if os.path.islink(target) or os.path.isfile(target):
        with suppress(FileNotFoundError):
            os.unlink(target)
    elif is_url(target) or os.path.isdir(target):
        links = _links_to(directory, target)
        is_latest = read_latest(storage, directory) == tag
        other = _newest_other(storage, directory, tag) if links or is_latest else None
        if is_latest and other is None:
            remove_latest(storage, directory)
        elif is_latest and other is not None:
            move_latest(storage, directory, other)
        _move_links(links, other)
        remove_tag(storage, directory, tag)


def _links_to(directory: str, target: str) -> list[Path]:
    if is_url(directory):
        return []
    links = [entry for entry in Path(directory).iterdir() if entry.is_symlink()]
    return [link for link in links if os.path.realpath(link) == os.path.realpath(target)]


def _move_links(links: list[Path], other: str | None) -> None:
    for link in links:
        if other is None:
            link.unlink()
        else:
            fresh = link.with_name(f".{link.name}.link")
            with suppress(FileNotFoundError):
                fresh.unlink()
            fresh.symlink_to(other)
            os.replace(fresh, link)


def _newest_other(storage: Storage, directory: str, tag: str) -> str | None:
    with suppress(CheckpointNotFoundError):
        for info in reversed(list_tags(storage, directory)):
            folder = f"{directory}/{info.name}"
            if info.summary is not None and info.name != tag and not os.path.islink(folder):
                return info.name
    return None
