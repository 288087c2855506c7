"""Staging from a device that copies on its own: nothing is hashed, written or given back before it has arrived."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.chunks import full_box
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.memory import aligned_buffer
from zero_ckpt.core.shard_file import BLOCK, ShardLayout, layout_shard
from zero_ckpt.core.shard_reader import open_shard
from zero_ckpt.core.sources import Source
from zero_ckpt.core.staging import ShardWrite


class Device:
    """Copies one thing after the other, some time after it was asked to."""

    def __init__(self) -> None:
        self._queue = ThreadPoolExecutor(1)
        self.copies: list[Future[None]] = []

    def copy(self, address: int, data: bytes) -> None:
        def run() -> None:
            time.sleep(0.002)
            ctypes.memmove(address, data, len(data))

        self.copies.append(self._queue.submit(run))

    def close(self) -> None:
        self._queue.shutdown()


class Event:
    def __init__(self, last: Future[None]) -> None:
        self._last = last

    def synchronize(self) -> None:
        self._last.result()


class FarSource(Source):
    def __init__(self, tensor: torch.Tensor, device: Device) -> None:
        super().__init__(tensor)
        self._far, self._bytes = device, tensor.numpy().tobytes()
        self.is_far = True

    def copy_to(self, address: int, start: int, stop: int, *, wait: bool = True) -> None:
        assert not wait
        self._far.copy(address, self._bytes[start:stop])

    def copied(self) -> Any:
        return Event(self._far.copies[-1])


class Broken(FarSource):
    def copy_to(self, address: int, start: int, stop: int, *, wait: bool = True) -> None:
        raise RuntimeError("the device is lost")


class Torn(FarSource):
    def copy_to(self, address: int, start: int, stop: int, *, wait: bool = True) -> None:
        super().copy_to(address, start, stop, wait=wait)
        raise RuntimeError("the device is lost")


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.close()


def three_blocks_and_a_bit() -> tuple[dict[str, torch.Tensor], ShardLayout]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": BLOCK // 4 * 3, "b": BLOCK // 4 + 5, "c": 7, "d": 1}  # of float32
    tensors = {key: torch.rand(size, generator=generator) for key, size in sizes.items()}
    items = [(k, "F32", tuple(t.shape), full_box(tuple(t.shape))) for k, t in tensors.items()]
    return tensors, layout_shard(items, {"role": "model", "rank": "0"})


def test_far_bytes_are_hashed_and_written_when_they_have_arrived(
    tmp_path: Path, device: Device
) -> None:
    tensors, layout = three_blocks_and_a_bit()
    sources = [FarSource(tensors[chunk.key], device) for chunk in layout.chunks]
    path, pool = str(tmp_path / "model.safetensors"), StagingPool(2)
    writer = LocalStorage().create(path, layout.nbytes)
    write = ShardWrite(writer, layout, sources, pool, lambda: None)
    assert all(copy.done() for copy in device.copies)  # staged: the device has read all of it
    record = layout.record(write.join())
    writer.finish(layout.nbytes)
    reader = open_shard(LocalStorage(), path, record)
    buffer = aligned_buffer(BLOCK)
    found = b"".join(bytes(reader.read_block(i, buffer)) for i in range(reader.num_blocks))
    reader.close()
    for chunk in layout.chunks:
        assert found[chunk.begin : chunk.end] == tensors[chunk.key].numpy().tobytes()


@pytest.mark.parametrize("kinds", [[FarSource, FarSource, Broken, Broken], [Torn] * 4])
def test_buffers_come_back_after_the_device_has_filled_them(
    kinds: list[type[FarSource]], tmp_path: Path, device: Device
) -> None:
    """Also when a copy fails: another save might take them."""
    tensors, layout = three_blocks_and_a_bit()
    sources = [
        kind(tensors[chunk.key], device) for kind, chunk in zip(kinds, layout.chunks, strict=True)
    ]
    pool = StagingPool(6)
    writer = LocalStorage().create(str(tmp_path / "model.safetensors"), layout.nbytes)
    with pytest.raises(RuntimeError, match="device is lost"):
        ShardWrite(writer, layout, sources, pool, lambda: None)
    assert device.copies
    assert all(copy.done() for copy in device.copies)
    assert len({id(pool.take().obj) for _ in range(pool.count)}) == pool.count
    writer.abort()


class FullDisk:
    def write(self, offset: int, data: memoryview) -> None:
        raise OSError(28, "No space left on device")


def test_a_disk_that_fails_meanwhile_is_told_when_all_has_arrived(device: Device) -> None:
    tensors, layout = three_blocks_and_a_bit()
    sources = [FarSource(tensors[chunk.key], device) for chunk in layout.chunks]
    pool = StagingPool(6)
    write = ShardWrite(FullDisk(), layout, sources, pool, lambda: None)  # type: ignore[arg-type]
    assert all(copy.done() for copy in device.copies)
    with pytest.raises(OSError, match="No space left"):
        write.join()
    assert len({id(pool.take().obj) for _ in range(pool.count)}) == pool.count


class Entered:
    """Stands for `torch.cuda.device`: which device is current, as a CUDA call would find it."""

    current = torch.device("cuda", 0)

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, Entered.current

    def __enter__(self) -> None:
        Entered.current = self._device

    def __exit__(self, *_: object) -> None:
        Entered.current = self._before


class CudaEvent:
    waited_on: ClassVar[list[torch.device]] = []

    def __init__(self, **_: Any) -> None:
        self.recorded: Any = None

    def record(self, stream: Any) -> None:
        self.recorded = stream

    def synchronize(self) -> None:
        self.waited_on.append(Entered.current)


def test_a_thread_that_waits_for_a_device_sets_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that finds a device current which the process does not use takes hundreds of MiB of it."""
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "Event", CudaEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    source = Source(torch.zeros(3))
    source.device = torch.device("cuda", 1)
    source.copied().synchronize()
    assert CudaEvent.waited_on == [torch.device("cuda", 1)]
