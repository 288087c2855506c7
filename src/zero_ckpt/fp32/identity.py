"""A key for each export, made of all that decides its bytes: two with the same key write the same files."""

from __future__ import annotations

import json
import os
import uuid

import xxhash

from zero_ckpt import __version__
from zero_ckpt.core.foreign import ForeignManifest
from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.places import is_url
from zero_ckpt.fp32.contents import Contents, Options
from zero_ckpt.fp32.writing import WINDOW

__all__ = ["export_key", "source_state"]


def source_state(folder: str, manifest: Manifest) -> str | None:
    """A text that changes when the content of a tag folder does. Ask for it before the files are opened.

    Empty for a folder of ours, whose manifest holds checksums of all data and is part of the key anyway. In another
    system's folder every `.pt` file counts, with its identity and the time of its last change, which no program can
    set. None where those are not known.
    """
    if not isinstance(manifest, ForeignManifest):
        return ""
    if is_url(folder):
        return None
    found = []
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(name for name in names if name.endswith(".pt")):
            state = os.stat(f"{path}/{name}")
            found.append((path, name, state.st_dev, state.st_ino, state.st_size, state.st_ctime_ns))
    return xxhash.xxh3_128_hexdigest(json.dumps(found).encode())


def export_key(contents: Contents, options: Options, state: str | None) -> str:
    """16 hexadecimal digits. `state`: the `source_state`; with None no two keys are the same."""
    state = uuid.uuid4().hex if state is None else state
    manifest = contents.checkpoint.manifest
    hasher = xxhash.xxh3_64()
    own = b"" if isinstance(manifest, ForeignManifest) else manifest.to_bytes()
    about = [__version__, WINDOW, options.as_record(), contents.names, contents.index, state]
    for part in (own, json.dumps(about).encode()):
        hasher.update(len(part).to_bytes(8, "little") + part)
    for file in range(len(contents.names)):
        layout = contents.layout(file)
        hasher.update(layout.nbytes.to_bytes(8, "little"))
        for literal in layout.literals:
            hasher.update(literal.data)
    return hasher.hexdigest()
