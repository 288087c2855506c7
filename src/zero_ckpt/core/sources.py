"""Where the bytes of a chunk come from: a live tensor of any strides on any device, or a stored one not read yet."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import xxhash

from zero_ckpt.core.chunks import Box, flat_range_boxes
from zero_ckpt.core.dtensors import address_of
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.memory import WINDOW, copy_bytes
from zero_ckpt.core.shard_file import BLOCK

__all__ = ["Slab", "Source", "digest_of", "source_of", "view_of"]


class _Copied:
    """Comes when all is done that was begun on the stream that is now current for a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def synchronize(self) -> None:
        # A thread begins on the first device, and CUDA would set that one up for this process, too.
        with torch.cuda.device(self._device):
            self._event.synchronize()


class Source:
    """The bytes of one chunk in live memory: a tensor of the chunk's shape, any strides, any device.

    `device`: where the tensor lies. `is_far`: whether that is outside of host memory.
    """

    __slots__ = ("_address", "_tensor", "device", "is_far")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.device = tensor, tensor.device
        self.is_far = not tensor.is_cpu
        self._address = address_of(tensor)

    def copy_to(self, address: int, start: int, stop: int, *, wait: bool = True) -> None:
        """Copy bytes `start .. stop` of the chunk, in row-major order, to `address`.

        Without `wait` a CUDA device may still be copying when this returns, on the stream that is current for it:
        until `copied()` has come.
        """
        if self._address:
            copy_bytes(address, self._address + start, stop - start)
        else:
            self._gather(address, start, stop, wait or self.device.type != "cuda")

    def copied(self) -> Any:
        """An event that comes when all that was begun on the tensor's CUDA device is copied; None for other devices."""
        if self.device.type != "cuda":
            return None
        return _Copied(self.device)

    def _gather(self, address: int, start: int, stop: int, wait: bool) -> None:
        """Copy through torch, for strided tensors and those on an accelerator."""
        tensor, size = self._tensor.detach(), self._tensor.element_size()
        memory = (ctypes.c_char * (stop - start)).from_address(address)
        target = torch.frombuffer(memory, dtype=torch.uint8)
        at = 0
        for box in flat_range_boxes(tuple(tensor.shape), start // size, stop // size):
            part = tensor[box.slices()].resolve_conj().resolve_neg().contiguous()
            part = part.view(-1).view(torch.uint8)
            target[at : at + part.numel()].copy_(part, non_blocking=not wait)
            at += part.numel()


class Slab:
    """Memory that stored tensors pass through on their way to another file, one after the other."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.owner: object = None
        self.start = self.nbytes = 0

    def holds(self, owner: object, at: int) -> bool:
        return self.owner is owner and self.start <= at < self.start + self.nbytes

    def take(self, owner: object, start: int, nbytes: int) -> torch.Tensor:
        """Room for bytes `start` and following of `owner`."""
        if not self.memory.numel():
            self.memory = torch.empty(BLOCK, dtype=torch.uint8, device="cpu")
        self.owner, self.start, self.nbytes = owner, start, nbytes
        return self.memory[:nbytes]


class LazySource(Source):
    """The bytes of a stored tensor, read a slab at a time."""

    __slots__ = ("_lazy", "_slab")

    def __init__(self, tensor: LazyTensor, slab: Slab) -> None:
        self._lazy, self._slab = tensor, slab
        self.device, self.is_far = torch.device("cpu"), False

    def copy_to(self, address: int, start: int, stop: int, *, wait: bool = True) -> None:
        slab = self._slab
        while start < stop:
            if not slab.holds(self, start):
                begin = start - start % BLOCK
                self._read(begin, min(self._lazy.nbytes, begin + BLOCK))
            offset = start - slab.start
            count = min(stop - start, slab.nbytes - offset)
            copy_bytes(address, slab.memory.data_ptr() + offset, count)
            address, start = address + count, start + count

    def _read(self, start: int, stop: int) -> None:
        size = self._lazy.element_size()
        target = self._slab.take(self, start, stop - start).view(self._lazy.dtype)
        at = 0
        for box in flat_range_boxes(tuple(self._lazy.shape), start // size, stop // size):
            self._lazy.read_into(box, target[at : at + box.numel].view(box.shape))
            at += box.numel


def source_of(tensor: torch.Tensor, slab: Slab) -> Source:
    """What copies the bytes of a tensor: from memory, or from its file through `slab` when it is lazy and not read."""
    if isinstance(tensor, LazyTensor) and not tensor.is_read:
        return LazySource(tensor, slab)
    return Source(tensor)


def digest_of(tensor: torch.Tensor) -> bytes:
    """XXH3-128 of a tensor's bytes in row-major order."""
    source, hasher = Source(tensor), xxhash.xxh3_128()
    buffer = bytearray(min(WINDOW, tensor.nbytes))
    memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    for start in range(0, tensor.nbytes, WINDOW):
        stop = min(start + WINDOW, tensor.nbytes)
        source.copy_to(ctypes.addressof(memory), start, stop)
        hasher.update(memoryview(buffer)[: stop - start])
    return hasher.digest()


def view_of(tensor: torch.Tensor, held: Box, wanted: Box) -> torch.Tensor:
    """The part `wanted` of a local tensor that holds the box `held`; both in global coordinates."""
    if held == wanted:
        return tensor
    return tensor[wanted.relative_to(held).slices()]
