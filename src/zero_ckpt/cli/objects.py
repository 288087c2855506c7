"""The objects of a checkpoint for people: read without torch, shown without running code."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

from zero_ckpt.cli.text import printable, size_text
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.objects import OBJECTS, RANK_OBJECTS, Shown, show_objects
from zero_ckpt.core.shards import open_shards
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import CorruptShardError

__all__ = ["MAX_ITEMS", "StoredObjects", "read_objects", "tree_lines"]

MAX_ITEMS = 20
"""Entries of one container that are shown, unless all are asked for."""

MAX_LINE = 80
"""Characters that a line may have for a mapping inside of another to be shown on it, and not one entry a line."""


class StoredObjects:
    """One tree of objects: as it is encoded in the file, and as values to show."""

    def __init__(self, data: bytes, describe: Callable[[str], str], where: str) -> None:
        self._data, self._describe, self._where = data, describe, where

    def encoded(self) -> Any:
        """Typed JSON, as `zero_ckpt.core.objects` describes it."""
        try:
            return json.loads(self._data)
        except (ValueError, RecursionError) as error:
            raise CorruptShardError(f"{self._where}: not JSON: {error}") from error

    def shown(self) -> Any:
        return show_objects(self._data, self._describe, self._where)


def read_objects(
    storage: Storage, folder: str, manifest: Manifest, rank: int
) -> dict[str, StoredObjects]:
    """`objects` (rank 0 has them) and `rank_objects` of one rank's state file. Raises `CorruptShardError`."""
    with open_shards(storage, folder, manifest) as shards:
        reader = shards.get("state", rank)
        texts = {c.key: _tensor_text(c.dtype, c.shape) for c in reader.chunks}
        shared = manifest.tensors["state"]
        texts |= {key: f"sharded {_tensor_text(p.dtype, p.shape)}" for key, p in shared.items()}
        trees = [OBJECTS, RANK_OBJECTS] if rank == 0 else [RANK_OBJECTS]
        return {
            tree: StoredObjects(
                reader.read_entry(f"{tree}.json"), texts.__getitem__, f"{reader.name}: {tree}"
            )
            for tree in trees
        }


def _tensor_text(dtype: str, shape: tuple[int, ...]) -> str:
    nbytes = itemsize(dtype)
    for extent in shape:
        nbytes *= extent
    return f"<tensor {dtype} {list(shape)}, {size_text(nbytes)}>"


def tree_lines(tree: Any, limit: int | None, indent: str = "") -> Iterator[str]:
    """Nested mappings and sequences of them as indented lines, everything else as one line each.

    Of one container at most `limit` entries are shown (None: all).
    """
    items = list(_items(tree))
    for key, value in items[:limit]:
        text = _inline(value) if _is_branch(value) else _leaf(value, limit)
        line = f"{indent}{key}: {text}"
        if not _is_branch(value) or (indent and text and len(line) <= MAX_LINE):
            yield line
        else:
            yield f"{indent}{key}:"
            yield from tree_lines(value, limit, f"{indent}  ")
    if limit is not None and len(items) > limit:
        yield f"{indent}... and {len(items) - limit} more (--full shows all)"


def _items(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield printable(key if key and isinstance(key, str) else repr(key)), value
    else:
        yield from ((f"[{i}]", value) for i, value in enumerate(tree))


def _is_branch(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list)) for v in value)


def _inline(value: Any) -> str:
    """A mapping of plain values in one line; nothing for anything else."""
    if not isinstance(value, dict) or any(map(_is_branch, value.values())):
        return ""
    return f"{{{', '.join(f'{key}: {_leaf(item, None)}' for key, item in _items(value))}}}"


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 6
        self.maxstring = self.maxother = 120

    def repr_Shown(self, value: Shown, _: int) -> str:
        return value.text

    def repr_ndarray(self, value: Any, _: int) -> str:
        return f"<array {value.dtype} {list(value.shape)}>"


def _leaf(value: Any, limit: int | None) -> str:
    return printable(repr(value) if limit is None else _Repr().repr(value))
