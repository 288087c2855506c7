"""What a shard file says of itself, believed only after every number in it was checked. Pure; imports no torch.

A header may have been damaged or made up. Promises: anything that is not a header of this format raises
`CorruptShardError`, whatever it holds; chunks that are returned lie end to end, each within its tensor.
"""

from __future__ import annotations

import json
from math import prod
from typing import Any, NamedTuple

from zero_ckpt.core.chunks import Box
from zero_ckpt.core.dtypes import ITEMSIZE, itemsize, stored_dtype, stored_shape
from zero_ckpt.core.layout import MAX_DIMS
from zero_ckpt.core.shard_file import BLOCK, PAD, REMEDY, TABLE, Chunk
from zero_ckpt.errors import CorruptShardError

__all__ = ["parse_header"]


def parse_header(
    header: bytes, name: str, file_bytes: int
) -> tuple[dict[str, str], tuple[Chunk, ...], int]:
    """(metadata, chunks, bytes of data) of a header, with every number checked."""
    try:
        entries = json.loads(header[8:])
        metadata = entries.pop("__metadata__")
        places = json.loads(metadata["chunks"])
        entries.pop(PAD, None)
        data_bytes, stop = entries.pop(TABLE)["data_offsets"]
        geometries = _Geometries()
        found = [geometries.of(entry, told, places.get(entry)) for entry, told in entries.items()]
        if not all(type(n) is int and n >= 0 for n in (data_bytes, stop)):
            raise ValueError("the block table has no place")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptShardError(
            f"{name}: the header is damaged, or not that of a zero_ckpt shard file ({error!r}). {REMEDY}"
        ) from error
    expected = len(header) + data_bytes + 8 * -(-data_bytes // BLOCK)
    if expected != file_bytes or len(header) + stop != file_bytes:
        raise CorruptShardError(
            f"{name}: {expected} bytes expected from its header, {file_bytes} found. {REMEDY}"
        )
    chunks, at = [], 0
    for entry, key, (dtype, shape, box, nbytes, size), offsets in found:
        begin, at = at, at + nbytes
        if offsets != [begin, at] or begin % size:
            raise CorruptShardError(
                f"{name}: tensor '{entry}': its bytes {offsets} do not follow byte {begin} "
                f"or do not fit shape {list(box.shape)} of {dtype}. {REMEDY}"
            )
        chunks.append(Chunk(entry, key, dtype, shape, box, begin, at))
    if not 0 <= data_bytes - at < 8:
        raise CorruptShardError(f"{name}: the chunks end at byte {at} of {data_bytes}. {REMEDY}")
    return metadata, tuple(chunks), data_bytes


class _Geometry(NamedTuple):
    """What many chunks have in common. `size`: bytes of an element."""

    dtype: str
    shape: tuple[int, ...]
    box: Box
    nbytes: int
    size: int


class _Geometries:
    """The geometries of a header's entries, each checked once: layers repeat."""

    def __init__(self) -> None:
        self._known: dict[Any, _Geometry] = {}

    def of(
        self, name: str, entry: dict[str, Any], place: dict[str, Any] | None
    ) -> tuple[str, str, _Geometry, list[int]]:
        """(name, key, geometry, unchecked data offsets) of an entry. Raises ValueError and the like for nonsense."""
        kind, stored, place = entry["dtype"], tuple(entry["shape"]), place or {}
        get = place.get
        told = kind, stored, get("dtype"), tuple(get("shape", "?")), tuple(get("offset", "?"))
        geometry = self._known.get(told)
        if geometry is None:
            geometry = self._known[told] = _geometry(name, kind, stored, place)
        key = get("key", name)
        if not isinstance(key, str):
            raise ValueError(f"entry '{name}' has no name")
        return name, key, geometry, entry["data_offsets"]


def _geometry(name: str, kind: str, stored: tuple[int, ...], place: dict[str, Any]) -> _Geometry:
    dtype = place.get("dtype", kind)
    box_shape = stored if dtype == kind else stored[:-1]
    shape = tuple(place.get("shape", box_shape))
    offset = tuple(place.get("offset", (0,) * len(shape)))
    numbers = (0, *box_shape, *shape, *offset)
    if {*map(type, numbers)} != {int} or not 0 <= min(numbers) <= max(numbers) < 1 << 63:
        raise ValueError(f"entry '{name}' is not made of natural numbers")
    if dtype not in ITEMSIZE:
        raise ValueError(f"entry '{name}' has no known dtype")
    if kind != stored_dtype(dtype) or stored != stored_shape(dtype, box_shape):
        raise ValueError(f"entry '{name}' does not hold elements of {dtype}")
    if len(shape) > MAX_DIMS or not len(shape) == len(offset) == len(box_shape):
        raise ValueError(f"entry '{name}' has different numbers of dimensions")
    if prod(box_shape) and any(a + n > s for a, n, s in zip(offset, box_shape, shape, strict=True)):
        raise ValueError(f"entry '{name}' reaches outside of its tensor")
    box, size = Box(offset, box_shape), itemsize(dtype)
    return _Geometry(dtype, shape, box, box.numel * size, size)
