"""What saves that never committed have left in a checkpoint directory, and its removal. Imports no torch.

Owns what of it may go. (Which files of a folder belong to no checkpoint is `tag_folder.loose_files`; a commit removes
those of its own tag.) Promises: what a manifest lists, what `repair` can make a checkpoint of, and what no save of ours
wrote is never removed, and nothing is removed while another job saves.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from zero_ckpt.core.finding import TagInfo, list_tags
from zero_ckpt.core.foreign import format_of
from zero_ckpt.core.lease import PREFIX, Lease
from zero_ckpt.core.manifest import MANIFEST_NAME, parse_shard_name
from zero_ckpt.core.memory import ALIGNMENT, aligned_buffer
from zero_ckpt.core.recovery import rebuild
from zero_ckpt.core.shard_file import FIRST_BYTES
from zero_ckpt.core.storage import Entry, Storage
from zero_ckpt.core.tag_folder import DAMAGED_NAME, loose_files, names_in
from zero_ckpt.core.verification import cause_unread
from zero_ckpt.errors import CorruptCheckpointError

__all__ = ["Leftover", "find_leftovers", "remove_leftovers"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files in the folder of `tag` that belong to no checkpoint. `kept`: why they must stay, or "".

    `is_committed`: the folder holds a checkpoint beside them.
    """

    tag: str
    files: tuple[str, ...]
    nbytes: int
    is_committed: bool
    kept: str = ""


def find_leftovers(storage: Storage, directory: str) -> list[Leftover]:
    """What is left over in every tag folder. A save that is under way looks as if it was left over, too.

    Reads all of what may be a whole save. Raises `CheckpointNotFoundError` without a directory, and OSErrors.
    """
    found = (_in_tag(storage, directory, info) for info in list_tags(storage, directory))
    return [leftover for leftover in found if leftover is not None]


def remove_leftovers(storage: Storage, directory: str) -> list[Leftover]:
    """Remove what is left over, and folders that are empty then; returns what was found, and what had to stay.

    While it runs no save may begin there; leases of killed jobs go, too. Where nothing is left over it writes nothing
    there. Raises `SaveError` when another job saves there, and what `find_leftovers` raises.
    """
    has_loose = any(_loose_in(storage, directory, tag) for tag in list_tags(storage, directory))
    if not has_loose and not any(e.name.startswith(PREFIX) for e in storage.list(directory)):
        return []
    lease = Lease(storage)
    try:
        lease.acquire(
            directory, lambda: None, "Nothing was removed. Run it when no job saves there."
        )
        found = find_leftovers(storage, directory)
        for leftover in found:
            if not leftover.kept:
                _remove(storage, directory, leftover)
        storage.sync(directory)
    finally:
        lease.release()
    return found


def _remove(storage: Storage, directory: str, leftover: Leftover) -> None:
    folder = f"{directory}/{leftover.tag}"
    for name in leftover.files:
        storage.remove(f"{folder}/{name}")
    with suppress(FileNotFoundError):  # an object store has no empty folders
        if storage.list(folder):
            storage.sync(folder)
        else:
            storage.remove(folder)


def _in_tag(storage: Storage, directory: str, info: TagInfo) -> Leftover | None:
    loose = _loose_in(storage, directory, info)
    if not loose:
        return None
    is_committed = info.summary is not None
    kept = "" if is_committed else _reason_to_keep(storage, f"{directory}/{info.name}", loose)
    names, nbytes = tuple(entry.name for entry in loose), sum(entry.nbytes for entry in loose)
    return Leftover(info.name, names, nbytes, is_committed, kept)


def _loose_in(storage: Storage, directory: str, info: TagInfo) -> list[Entry]:
    """The files of a tag's folder that belong to no checkpoint; none where nothing tells which do. Opens no file."""
    try:
        entries = storage.list(f"{directory}/{info.name}")
    except FileNotFoundError:  # it was removed meanwhile
        return []
    names = [entry.name for entry in entries if not entry.is_dir]
    is_damaged = MANIFEST_NAME in names and info.summary is None
    if is_damaged or format_of(names) is not None:
        return []
    return loose_files(entries, () if info.summary is None else info.summary.files)


def _reason_to_keep(storage: Storage, folder: str, loose: list[Entry]) -> str:
    """Why the files of a folder without a manifest must stay; "" when nothing speaks for them."""
    if DAMAGED_NAME in names_in(storage, folder):
        return "its manifest was put aside by 'zero-ckpt repair --quarantine'"
    shards = [entry for entry in loose if parse_shard_name(entry.name) is not None]
    try:
        if not all(_began_here(storage, folder, entry) for entry in shards):
            return "it holds files that no save of zero_ckpt has written"
        rebuild(storage, folder)
    except (CorruptCheckpointError, OSError) as error:
        unread = cause_unread(error)
        return f"it cannot be read: {unread.strerror or unread}" if unread else ""
    return f"all its files are whole, 'zero-ckpt repair {folder}' makes it a checkpoint"


def _began_here(storage: Storage, folder: str, entry: Entry) -> bool:
    """Whether a shard file begins as ours do, or, of a save that was cut off early, holds nothing yet."""
    nbytes = min(entry.nbytes, ALIGNMENT)
    file = storage.open(f"{folder}/{entry.name}")
    try:
        with aligned_buffer(ALIGNMENT) as buffer:
            file.read_into(0, nbytes, buffer)
            start = bytes(buffer[8:nbytes])
    finally:
        file.close()
    return start.startswith(FIRST_BYTES) or not any(start)
