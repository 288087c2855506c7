"""A checkpoint's name: what a tag may be, and the one that `latest` holds. Imports no torch.

A tag is the name of a folder of the checkpoint directory; `latest` is a file there that holds one tag's name. Owns
which names are tags, and how `latest` is read; never writes it, and does not look whether what it names can be loaded.
"""

from __future__ import annotations

from zero_ckpt.core.foreign import format_of
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import names_in, why_unread
from zero_ckpt.errors import ConfigurationError

__all__ = [
    "LATEST_NAME",
    "LATEST_UNIVERSAL_NAME",
    "check_tag",
    "look_up_latest",
    "read_latest",
    "tag_in",
]

LATEST_NAME = "latest"
LATEST_UNIVERSAL_NAME = "latest_universal"
"""DeepSpeed's name for the same; read where there is no `latest`."""


def check_tag(tag: object) -> str:
    """The tag as a string. Raises `ConfigurationError` for one that a path or a file system would misread."""
    name = str(tag)
    encoded = name.encode(errors="replace")
    bad = (
        set(name) & set("/\\\0\n\r")
        or name in ("", ".", "..", LATEST_NAME, f"{LATEST_NAME}.tmp")
        or len(encoded) > 200
        or encoded.decode() != name
    )
    if bad or name != name.strip() or name.startswith("-"):
        raise ConfigurationError(
            f"tag {name!r} cannot be a folder's name: expected 1 to 200 bytes of UTF-8 without slashes, line breaks, "
            f"surrounding spaces or a leading '-', and not '{LATEST_NAME}', '.' or '..'"
        )
    return name


def tag_in(storage: Storage, directory: str, tag: str) -> str:
    """The tag. DeepSpeed lets one be a path below the directory: that is taken where such a checkpoint is there."""
    try:
        return check_tag(tag)
    except ConfigurationError:
        parts = tag.split("/")
        is_path = len(parts) > 1 and all(part and part not in (".", "..") for part in parts)
        if is_path and format_of(names_in(storage, f"{directory}/{tag}")) is not None:
            return tag
        raise


def read_latest(storage: Storage, directory: str) -> str | None:
    """The tag that `latest` names, or None when there is no such file or it is empty or unusable."""
    return look_up_latest(storage, directory)[0]


def look_up_latest(storage: Storage, directory: str) -> tuple[str | None, str]:
    """The tag that `latest` names, or None and what is wrong with the file."""
    path = f"{directory}/{LATEST_NAME}"
    try:
        text = _latest_text(storage, directory)
        return tag_in(storage, directory, text.strip()), ""
    except FileNotFoundError:
        return None, f"{path} is missing"
    except ConfigurationError:
        return None, f"{path} names no tag, it holds {text[:40]!r}"
    except (OSError, ValueError) as error:
        return None, f"{path} cannot be read: {why_unread(error)}"


def _latest_text(storage: Storage, directory: str) -> str:
    try:
        return storage.get(f"{directory}/{LATEST_NAME}", 4096).decode()
    except FileNotFoundError:
        return storage.get(f"{directory}/{LATEST_UNIVERSAL_NAME}", 4096).decode()
