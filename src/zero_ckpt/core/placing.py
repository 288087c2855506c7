"""Where stored bytes go: from a stored chunk to their place in a live tensor.

Knows neither files nor blocks. Bytes that lie in one piece both in the chunk and in the target are copied as they are,
or may be read straight into it; all others go through torch: other strides, dtypes and devices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from zero_ckpt.core.chunks import Box, flat_range_boxes
from zero_ckpt.core.dtensors import DTYPE_NAMES, TORCH_DTYPES, address_of
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.memory import copy_bytes
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.shard_file import Chunk

__all__ = ["Part", "Request", "byte_span", "copy_parts", "home"]


class Request(NamedTuple):
    """Fill `target`, a local tensor of `box.shape`, with `box` of the stored tensor `key`.

    Another dtype than the stored one is converted. `target` may have any strides and lie on any device.
    """

    role: str
    key: str
    placed: Placed
    box: Box
    target: torch.Tensor


class Part(NamedTuple):
    """What one request takes from one stored chunk."""

    request: Request
    chunk: Chunk
    overlap: Box


def byte_span(chunk: Chunk, overlap: Box) -> tuple[int, int]:
    """(begin, end) in the data section of the bytes from the overlap's first element to its last one."""
    if overlap.shape == chunk.box.shape:
        return chunk.begin, chunk.end
    first = last = 0
    relative = overlap.relative_to(chunk.box)
    for offset, extent, size in zip(relative.offset, relative.shape, chunk.box.shape, strict=True):
        first, last = first * size + offset, last * size + offset + extent - 1
    size = itemsize(chunk.dtype)
    return chunk.begin + first * size, chunk.begin + (last + 1) * size


def copy_parts(data: memoryview, start: int, parts: Sequence[Part]) -> None:
    """Copy to every part's target the bytes that `data` has for it. `start`: the place of its first one in the file."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    stop = start + len(data)
    for part in parts:
        first, last = byte_span(part.chunk, part.overlap)
        begin = first if first > start else start  # max() takes three times as long
        end = last if last < stop else stop
        if begin >= end:
            continue
        target = _direct_address(part)
        if target:
            copy_bytes(target + begin - first, address + begin - start, end - begin)
        else:
            _copy_strided(data[begin - start : end - start], begin, part)


def home(parts: Sequence[Part], start: int, nbytes: int) -> memoryview | None:
    """The memory of the one target to which these bytes of the data section go as they are, if there is one."""
    for part in parts:
        first, last = byte_span(part.chunk, part.overlap)
        if first <= start and start + nbytes <= last and (address := _direct_address(part)):
            return memoryview((ctypes.c_char * nbytes).from_address(address + start - first)).cast(
                "B"
            )
    return None


def _direct_address(part: Part) -> int:
    """The address to which the overlap's bytes go, if they are contiguous in both chunk and target; else 0."""
    (_, _, _, wanted, target), chunk, overlap = part
    address = address_of(target)
    if not address or DTYPE_NAMES[target.dtype] != chunk.dtype:
        return 0
    shape = overlap.shape
    for outer in (chunk.box.shape, wanted.shape):
        if shape != outer and not _in_one_piece(shape, outer):
            return 0
    if shape == wanted.shape:
        return address
    at = 0
    for offset, size in zip(overlap.relative_to(wanted).offset, wanted.shape, strict=True):
        at = at * size + offset
    return address + at * itemsize(chunk.dtype)


def _in_one_piece(shape: Sequence[int], outer: Sequence[int]) -> bool:
    """Whether a box of `shape` in a row-major tensor of shape `outer` is one range of its memory."""
    whole = True
    for extent, size in zip(reversed(shape), reversed(outer), strict=True):
        if extent != 1 and not whole:
            return False
        whole = whole and extent == size
    return True


def _copy_strided(data: memoryview, begin: int, part: Part) -> None:
    """Copy through torch, for targets whose strides, dtype or device are not those of the stored bytes."""
    chunk, request = part.chunk, part.request
    size, dtype = itemsize(chunk.dtype), TORCH_DTYPES[chunk.dtype]
    first, last = (begin - chunk.begin) // size, (begin - chunk.begin + len(data)) // size
    flat = torch.frombuffer(data, dtype=torch.uint8)
    at = 0
    for box in flat_range_boxes(chunk.box.shape, first, last):
        nbytes = box.numel * size
        stored = box.shifted(chunk.box.offset)
        wanted = stored.intersect(part.overlap)
        if wanted is not None:
            source = (
                flat[at : at + nbytes]
                .view(dtype)
                .view(box.shape)[wanted.relative_to(stored).slices()]
            )
            request.target[wanted.relative_to(request.box).slices()].copy_(source)
        at += nbytes
