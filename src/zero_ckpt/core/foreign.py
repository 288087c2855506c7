"""The seam to other systems' checkpoints: a folder that one of them wrote, as a manifest and files to read.

A format is a module that says which folders are its own and describes one of them in our terms: which tensors there are
and where their chunks lie. All else (finding, listing, reading any box, collapsing, loading) then works on it as on a
checkpoint of ours. Nothing is ever written to or removed from such a folder. Imports no torch; a format's module is
imported when a folder is met that is not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.storage import Storage

__all__ = ["ForeignContent", "ForeignFormat", "ForeignManifest", "format_of", "problem_of"]

_FORMATS = ("zero_ckpt.interop.deepspeed",)
"""Modules that are a `ForeignFormat`."""


class ForeignFormat(Protocol):
    def recognises(self, files: Sequence[str]) -> bool:
        """Whether a folder with files of these names holds one checkpoint."""

    def open_tag(self, storage: Storage, folder: str) -> ForeignManifest:
        """Describes it. Raises what `tag_folder.read_tag` names."""


class ForeignContent(Protocol):
    """The bytes of another system's checkpoint."""

    def file(self, role: str, rank: int) -> Any:
        """The `StoredFile` that holds the chunks of all runs whose rank is `rank`."""

    def damage(self, progress: Callable[[int], None]) -> Iterator[str]:
        """Reads everything; a line for each damage, as far as the format lets it be found."""

    def close(self) -> None: ...


class _NoContent:
    """The content of a manifest that was made without files."""

    def file(self, role: str, rank: int) -> Any:
        raise LookupError(f"no {role} file {rank}")

    def damage(self, progress: Callable[[int], None]) -> Iterator[str]:
        return iter(())

    def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True)
class ForeignManifest(Manifest):
    """What another system's files hold. The rank of a run is the number of a file here: `sources[rank]`.

    `format`: the system's name. `problems`: role -> why its tensors cannot be read.
    """

    format: str = ""
    sources: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    content: ForeignContent = field(default_factory=_NoContent, compare=False, repr=False)

    def file_of(self, role: str, rank: int) -> str:
        return self.sources[rank] if rank < len(self.sources) else ""


def format_of(files: Sequence[str]) -> ForeignFormat | None:
    """The format that a folder with these files has; None for a folder of ours or of nobody's."""
    if not any(name.endswith(".pt") for name in files):
        return None
    for name in _FORMATS:
        module: Any = import_module(name)
        if module.recognises(files):
            found: ForeignFormat = module
            return found
    return None


def problem_of(manifest: Manifest, role: str) -> str:
    """Why the tensors of `role` cannot be read; "" when they can."""
    return manifest.problems.get(role, "") if isinstance(manifest, ForeignManifest) else ""
