"""`automatic_checkpoint_naming`: which folder a save goes to, which one a load takes, and which are removed.

`<project_dir>/checkpoints/checkpoint_{i}` is a checkpoint directory of its own, with `latest` and one tag in it.
Nothing else appears in `project_dir` or in `checkpoints/`. Only rank 0 looks and decides. A folder counts as a
checkpoint when it holds a committed one of ours, or one that Accelerate has completed (it writes `random_states_*`
last).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

from zero_ckpt.core.finding import list_tags
from zero_ckpt.core.manifest import MANIFEST_NAME
from zero_ckpt.core.places import AnyStorage, is_url
from zero_ckpt.core.retention import remove_tag
from zero_ckpt.core.tag_folder import is_tag_folder
from zero_ckpt.errors import ConfigurationError, NothingSavedError, ZeroCkptError

__all__ = ["candidates", "directory_for_save", "is_accelerates", "next_iteration", "retire"]

_storage = AnyStorage()

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model_fsdp")
"""How the names of Accelerate's own weights begin; engines such as DeepSpeed use others."""


def is_accelerates(directory: str) -> bool:
    """Whether Accelerate's own code is to read this folder: Accelerate wrote it, and nothing there is for the core.

    A checkpoint that Accelerate completed is read by Accelerate, even if the core could open it (as it can FSDP's); but
    not one of its DeepSpeed engine, whose weights its other code does not find. Accelerate writes to no object store.
    """
    if is_url(directory) or _is_committed(directory):
        return False
    has_weights = any(name.startswith(_WEIGHTS) for name in os.listdir(directory))
    if is_tag_folder(_storage, directory) or list_tags(_storage, directory):
        return has_weights and _is_complete(directory)
    return has_weights or _is_complete(directory)


def _is_complete(directory: str) -> bool:
    """Whether Accelerate has written a checkpoint there, to the end."""
    names = os.listdir(directory)
    return any(re.fullmatch(r"random_states_\d+\.pkl", name) for name in names)


def _is_committed(directory: str) -> bool:
    """Whether it is a tag's folder of ours, or holds one."""
    folders = [directory, *(os.path.join(directory, name) for name in os.listdir(directory))]
    return any(os.path.isfile(os.path.join(folder, MANIFEST_NAME)) for folder in folders)


def _is_checkpoint(directory: str) -> bool:
    return os.path.isdir(directory) and (_is_committed(directory) or _is_complete(directory))


def _numbered(checkpoints: str) -> list[tuple[int, str]]:
    """(number, path) of every `checkpoint_{number}` folder, ascending."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    found = ((re.fullmatch(r"checkpoint_(\d+)", name), name) for name in names)
    paths = ((int(match[1]), os.path.join(checkpoints, name)) for match, name in found if match)
    return sorted((number, path) for number, path in paths if os.path.isdir(path))


def directory_for_save(checkpoints: str, iteration: int) -> str:
    """The folder of save number `iteration`. What a save that failed has left there may be used again.

    Raises `ConfigurationError`, a ValueError with Accelerate's text, when there is a checkpoint already.
    """
    directory = os.path.join(checkpoints, f"checkpoint_{iteration}")
    if _is_checkpoint(directory):
        raise ConfigurationError(
            f"Checkpoint directory {directory} ({iteration}) already exists. Please manually override "
            "`self.save_iteration` with what iteration to start with."
        )
    return directory


def next_iteration(checkpoints: str) -> int:
    """The number after the highest `checkpoint_{number}` there is; 0 without any."""
    return max((number for number, _ in _numbered(checkpoints)), default=-1) + 1


def candidates(checkpoints: str) -> Iterator[str]:
    """Folders to load from, newest first; what was never completed is passed over.

    Raises `NothingSavedError` when there is none.
    """
    found = [path for _, path in reversed(_numbered(checkpoints)) if _is_checkpoint(path)]
    if not found:
        raise NothingSavedError(
            f"{checkpoints}: no committed checkpoint_<number> folder here. Give load_state the checkpoint's folder."
        )
    yield from found


def retire(checkpoints: str, total_limit: int, saved: str) -> str:
    """Remove what is older than the newest `total_limit` checkpoints; never `saved`, the one just committed.

    Among those that are kept, folders that were never completed stay. Returns a notice for the user when something
    could not be removed, or "".
    """
    numbered = _numbered(checkpoints)
    complete = [number for number, path in numbered if _is_checkpoint(path)]
    oldest = complete[-total_limit] if 0 < total_limit <= len(complete) else -1
    problems = []
    for number, path in numbered:
        if number < oldest and not os.path.samefile(path, saved):
            try:
                _remove(path)
            except (OSError, ZeroCkptError) as error:
                problems.append(f"{path}: {error}")
    return f"old checkpoints could not be removed: {'; '.join(problems)}" if problems else ""


def _remove(directory: str) -> None:
    """Remove a directory: first, durably, what makes it a checkpoint, so that a crash leaves no torn one."""
    for tag in list_tags(_storage, directory):
        remove_tag(_storage, directory, tag.name)
    shutil.rmtree(directory)
