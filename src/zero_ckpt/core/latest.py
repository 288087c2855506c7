"""Writing `latest`, and noticing that somebody else does. Imports no torch.

Owns every change of that file; how it is read is in `tags`. Remembers for each directory what this process has made of
`latest`: a lease refuses jobs whose saves overlap, and this tells of those that save in turns, which no lease can see.
"""

from __future__ import annotations

import threading

from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tags import LATEST_NAME, read_latest

__all__ = ["move_latest", "notice_of_others", "remove_latest"]

_lock = threading.Lock()
_ours: dict[str, str] = {}


def move_latest(storage: Storage, directory: str, tag: str) -> None:
    """Let `latest` name this tag, durably."""
    with _lock:
        storage.put(f"{directory}/{LATEST_NAME}", f"{tag}\n".encode())
        _ours[directory] = tag


def remove_latest(storage: Storage, directory: str) -> None:
    with _lock:
        storage.remove(f"{directory}/{LATEST_NAME}")
        _ours.pop(directory, None)


def notice_of_others(storage: Storage, directory: str) -> str:
    """What to tell the user when `latest` names another tag than this process has let it name; "" otherwise."""
    with _lock:
        ours, found = _ours.get(directory), None
        if ours is not None:
            found = read_latest(storage, directory)
    if found in (None, ours):
        return ""
    return (
        f"{directory}: '{LATEST_NAME}' names '{found}', and not '{ours}', as this job has left it: another job saves "
        "here too, or somebody has changed the file. Give each job a directory of its own: jobs that share one "
        "overwrite tags of the same name, and remove each other's checkpoints."
    )
