"""Where an export may go, and the folders that it makes there. Reads names only, and no file.

Shard files have names like those of exported weights, so an export into a checkpoint's folder could overwrite it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress

from zero_ckpt.core.foreign import format_of
from zero_ckpt.core.manifest import MANIFEST_NAME
from zero_ckpt.core.places import is_url
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import names_in
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32.publishing import Output

__all__ = ["check_destination", "folders_to_make", "remove_empty"]

_OF_A_SAVE = re.compile(
    r"(?:(?:optim|state)-\d{5,}-of-\d{5,}(?:\.g\d+)?"
    r"|model-(?:0{5,}-of-\d{5,}(?:\.g\d+)?|\d{5,}-of-\d{5,}\.g\d+))\.safetensors"
)
"""Names that a save gives and an export does not: files of exported weights are numbered from 1."""


def check_destination(storage: Storage, output: Output) -> None:
    """Raises `ConfigurationError` when the output would lie in a checkpoint's folder, of whatever system."""
    for folder in (output.folder, output.path):
        if found := _checkpoint_in(names_in(storage, folder)):
            raise ConfigurationError(
                f"{folder}: {found}, whose files an export there could overwrite. Nothing was written. Give a path "
                f"outside of it, such as '{os.path.dirname(folder).rstrip('/')}/fp32'."
            )


def _checkpoint_in(names: Sequence[str]) -> str:
    """The kind of checkpoint that has files of these names, in words; "" when they are of none."""
    if MANIFEST_NAME in names:
        return f"the folder of a checkpoint (it holds {MANIFEST_NAME})"
    if shard := next((name for name in names if _OF_A_SAVE.fullmatch(name)), None):
        return f"the folder of a checkpoint that is not committed (it holds {shard})"
    return "another system's checkpoint" if format_of(names) is not None else ""


def folders_to_make(folder: str) -> list[str]:
    """The folder and those above it that do not exist, innermost first; none in an object store."""
    found = []
    while not is_url(folder) and not os.path.lexists(folder):
        found.append(folder)
        folder = os.path.dirname(folder)
    return found


def remove_empty(folders: Sequence[str]) -> None:
    """Remove these, innermost first, as far as nothing is in them."""
    with suppress(OSError):
        for folder in folders:
            os.rmdir(folder)
