"""Whatever the ranks held, any box of any tensor reads back bitwise into any live tensor; damage never reaches one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.memory import MemoryStorage
from tests.core.strategies import boxes_in, held_boxes, layouts
from zero_ckpt.core import pipeline
from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.dtensors import TORCH_DTYPES
from zero_ckpt.core.layout import Layout, Mesh
from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.planner import plan_save
from zero_ckpt.core.reader import Request
from zero_ckpt.core.saving import Captured, plan_shards, write_shards
from zero_ckpt.errors import CorruptShardError

RANKS = 8
SMALL_BLOCK = 4096
DTYPES = ["F32", "BF16", "U8", "F64", "BOOL", "F8_E5M2", "C128"]


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks of one page and windows of less, so that small tensors span several. With buffers of their own."""
    with ExitStack() as changed:
        for name in (
            *("shard_file", "shard_header", "shard_reader", "sources"),
            *("staging", "reader", "pipeline"),
        ):
            changed.enter_context(patch(f"zero_ckpt.core.{name}.BLOCK", SMALL_BLOCK))
        for name in ("shard_reader", "staging", "reader"):
            changed.enter_context(patch(f"zero_ckpt.core.{name}.WINDOW", 1024))
        changed.enter_context(patch("zero_ckpt.core.pipeline._spare", []))
        yield


def values(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Every element differs from its neighbours, in every dtype."""
    numel = torch.Size(shape).numel()
    return (torch.arange(numel) % 113).reshape(shape).to(TORCH_DTYPES[dtype])


def save(tensors: dict[str, Layout]) -> tuple[MemoryStorage, Manifest]:
    """What `RANKS` ranks write that hold the tensors in the given layouts, some with odd strides."""
    storage = MemoryStorage()
    captured = [Captured() for _ in range(RANKS)]
    for number, (key, layout) in enumerate(tensors.items()):
        whole = values(layout.dtype, layout.shape)
        held = (
            held_boxes(layout) if layout.mesh else {r: full_box(layout.shape) for r in range(RANKS)}
        )
        for rank in range(RANKS):
            captured[rank].table.roles["model"][key] = layout
            part = whole[held[rank].slices()] if rank in held else torch.empty(0)
            if part.ndim > 1 and number % 2:
                part = part.transpose(0, -1).contiguous().transpose(0, -1)
            captured[rank].tensors["model"][key] = part
    plan = plan_save([(captured[0].table, range(RANKS))])
    manifest = Manifest("t", 1, RANKS, 3, tensors=plan.roles)
    pool = StagingPool()
    for rank in range(RANKS):
        captured[rank].private = {"rank_objects.json": torch.tensor(list(b"{}"), dtype=torch.uint8)}
        shards = plan_shards(captured[rank], plan, rank, RANKS, 1, {}, {})
        manifest.files |= write_shards(storage, "/t", shards, pool, lambda: None)[0]
    return storage, Manifest.from_bytes(manifest.to_bytes())


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Layout]:
    found = {}
    for index in range(draw(st.integers(1, 3))):
        grown = draw(st.sampled_from([1, 1, 9, 40]))
        drawn = draw(layouts())
        shape = tuple(
            n * (grown if d == len(drawn.shape) - 1 else 1) for d, n in enumerate(drawn.shape)
        )
        dtype = draw(st.sampled_from(DTYPES))
        mesh = drawn.mesh if draw(st.booleans()) else None
        found[f"t{index}"] = Layout(dtype, shape, mesh, drawn.placements if mesh else ())
    return found


def target_of(data: st.DataObject, dtype: torch.dtype, box: Box) -> torch.Tensor:
    """A tensor of the box's shape: contiguous, transposed in memory, or with holes between its elements."""
    kind = data.draw(st.sampled_from(["contiguous", "transposed", "holes"]))
    shape = box.shape
    if kind == "transposed":
        return torch.empty(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])
    if kind == "holes" and shape:
        return torch.empty((*shape[:-1], shape[-1] * 2), dtype=dtype)[..., ::2]
    return torch.empty(shape, dtype=dtype)


@settings(max_examples=40)
@given(st.data(), tensor_sets())
def test_any_box_reads_back_bitwise_into_any_tensor(
    data: st.DataObject, tensors: dict[str, Layout]
) -> None:
    with small_blocks():
        storage, manifest = save(tensors)
        storage.far = data.draw(st.booleans())
        requests: list[Request] = []
        with Checkpoint(storage, "/t", manifest) as checkpoint:
            for key, layout in tensors.items():
                for _ in range(2):
                    box = data.draw(boxes_in(layout.shape))
                    target = target_of(data, TORCH_DTYPES[layout.dtype], box)
                    requests.append(checkpoint.request("model", key, target, box))
            plan = checkpoint.plan_reads(requests)
            if verified := data.draw(st.booleans()):
                plan.verify(lambda: None, room=SMALL_BLOCK * data.draw(st.integers(0, 5)))
            plan.fill(lambda: None, verified=verified, private=data.draw(st.booleans()))
            for key, layout in tensors.items():
                assert same(checkpoint.tensor("model", key), values(layout.dtype, layout.shape))
        for request in requests:
            layout = tensors[request.key]
            expected = values(layout.dtype, layout.shape)[request.box.slices()]
            assert same(request.target, expected)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.clone(memory_format=torch.contiguous_format).view(-1) for t in (a, b)]
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and (a.numel() == 0 or torch.equal(*(t.view(torch.uint8) for t in raw)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_other_dtypes_are_converted(dtype: torch.dtype) -> None:
    storage, manifest = save({"w": Layout("F32", (10, 7))})
    target = torch.empty(10, 7, dtype=dtype)
    with Checkpoint(storage, "/t", manifest) as checkpoint:
        checkpoint.read([checkpoint.request("model", "w", target)])
    assert torch.equal(target, values("F32", (10, 7)).to(dtype))


class Wrapper(torch.Tensor):
    """A tensor without memory of its own."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        self: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [a.inner if isinstance(a, Wrapper) else a for a in args]
        return func(*args, **(kwargs or {}))


def test_a_wrapper_is_filled_through_what_it_wraps() -> None:
    """In pieces, so that some do not begin where the tensor does."""
    layout = Layout("F32", (64, 40), Mesh((RANKS,), tuple(range(RANKS))), ("S0",))
    storage, manifest = save({"w": layout})
    inner = torch.zeros(64, 40)
    with Checkpoint(storage, "/t", manifest) as checkpoint:
        checkpoint.read([checkpoint.request("model", "w", Wrapper(inner))])
    assert torch.equal(inner, values("F32", (64, 40)))


def flip(storage: MemoryStorage, name: str, at: int) -> None:
    data = bytearray(storage.files[name])
    data[at] ^= 1
    storage.files[name] = bytes(data)


@pytest.mark.parametrize("far", [False, True])
def test_damage_is_found_where_it_is_read_and_reaches_no_tensor(far: bool) -> None:
    with small_blocks():
        storage, manifest = save({"w": Layout("U8", (3 * SMALL_BLOCK,), None)})
        storage.far = far
        rank = next(iter(manifest.tensors["model"]["w"].runs)).rank
        name = f"/t/{manifest.file_of('model', rank)}"
        header = len(storage.files[name]) - 3 * SMALL_BLOCK - 3 * 8
        flip(storage, name, header + SMALL_BLOCK + 5)
        for first, damaged in ((0, False), (SMALL_BLOCK, True), (2 * SMALL_BLOCK, False)):
            box = Box((first,), (100,))
            target = torch.full((100,), 7, dtype=torch.uint8)
            with Checkpoint(storage, "/t", manifest) as checkpoint:
                plan = checkpoint.plan_reads([checkpoint.request("model", "w", target, box)])
                if not damaged:
                    plan.verify(lambda: None)
                    plan.fill(lambda: None, verified=True)
                    assert same(target, values("U8", (3 * SMALL_BLOCK,))[box.slices()])
                    continue
                for step in (plan.verify, plan.fill):
                    with pytest.raises(CorruptShardError, match=r"block 1 .*tensor 'w'.*checksum"):
                        step(lambda: None)
                assert set(target.tolist()) == {7}


@pytest.mark.parametrize("far", [False, True])
def test_what_was_damaged_since_it_was_verified_is_found_as_it_is_copied(far: bool) -> None:
    with small_blocks():
        storage, manifest = save({"w": Layout("U8", (3 * SMALL_BLOCK,), None)})
        storage.far = far
        rank = next(iter(manifest.tensors["model"]["w"].runs)).rank
        name = f"/t/{manifest.file_of('model', rank)}"
        target = torch.zeros(3 * SMALL_BLOCK, dtype=torch.uint8)
        checkpoint = Checkpoint(storage, "/t", manifest)
        checkpoint.plan_reads([checkpoint.request("model", "w", target)]).verify(lambda: None)
        flip(storage, name, len(storage.files[name]) - 3 * 8 - 1)
        with Checkpoint(storage, "/t", manifest) as checkpoint:
            plan = checkpoint.plan_reads([checkpoint.request("model", "w", target)])
            with pytest.raises(CorruptShardError, match=r"block 2 .*checksum"):
                plan.fill(lambda: None, verified=True)


def test_what_every_rank_reads_lies_in_few_blocks() -> None:
    """Such as an optimizer's step of each parameter, between large tensors of which each rank reads its own part."""
    mesh = Mesh((RANKS,), tuple(range(RANKS)))
    tensors = {}
    for i in range(20):
        tensors[f"t{i}.exp_avg"] = Layout("F32", (RANKS, SMALL_BLOCK), mesh, ("S0",))
        tensors[f"t{i}.step"] = Layout("F32", ())
    with small_blocks():
        storage, manifest = save(tensors)
        with Checkpoint(storage, "/t", manifest) as checkpoint:
            requests = []
            for key, layout in tensors.items():
                box = Box((3, 0), (1, SMALL_BLOCK)) if layout.shape else None
                target = torch.empty(box.shape if box else ())
                requests.append(checkpoint.request("model", key, target, box))
            plan = checkpoint.plan_reads(requests)
            own = manifest.file_of("model", 3)
            others = [f for f in plan.files if not f.reader.name.endswith(own)]
            assert len(others) <= 2
            assert sum(len(f.blocks) for f in others) <= 2


class Failing:
    """A storage whose n-th block cannot be read, and that counts."""

    def __init__(self, inner: MemoryStorage, failing: int) -> None:
        self._inner, self._failing, self.count = inner, failing, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open(self, path: str) -> Any:
        file = self._inner.open(path)
        plain = file.read_into

        def read_into(offset: int, *rest: Any) -> None:
            if offset > len(self._inner.files[path]) // 8:  # header and table have been read
                self.count += 1
                if self.count > self._failing:
                    raise OSError(5, "Input/output error")
            plain(offset, *rest)

        file.read_into = read_into  # type: ignore[method-assign]
        return file


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("action", ["verify", "fill"])
@pytest.mark.parametrize("failing", [1, 5, 20])
def test_an_error_stops_all_threads_and_gives_every_buffer_back(
    far: bool, action: str, failing: int
) -> None:
    """However many blocks wait for a thread when it happens, nobody waits for a buffer that never comes."""
    blocks = 64
    with small_blocks():
        inner, manifest = save({"w": Layout("U8", (blocks * SMALL_BLOCK,), None)})
        inner.far = far
        target = torch.zeros(blocks * SMALL_BLOCK, dtype=torch.uint8)
        before = threading.active_count()
        storage = Failing(inner, failing)
        with Checkpoint(cast(Any, storage), "/t", manifest) as checkpoint:
            plan = checkpoint.plan_reads([checkpoint.request("model", "w", target)])
            with pytest.raises(CorruptShardError, match="Input/output error"):
                getattr(plan, action)(lambda: None)
        assert threading.active_count() == before
        assert len(pipeline._spare) == pipeline._BUFFERS
        assert storage.count < 8 * blocks


@pytest.mark.parametrize(("far", "room", "again"), [(True, 64, 0), (True, 24, 40), (False, 64, 64)])
def test_what_no_page_cache_keeps_is_read_once_as_far_as_there_is_room(
    far: bool, room: int, again: int
) -> None:
    blocks, windows = 64, 1 if far else SMALL_BLOCK // 1024
    with small_blocks():
        inner, manifest = save({"w": Layout("U8", (blocks * SMALL_BLOCK,), None)})
        inner.far = far
        storage = Failing(inner, 10**9)
        target = torch.zeros(blocks * SMALL_BLOCK, dtype=torch.uint8)
        with Checkpoint(cast(Any, storage), "/t", manifest) as checkpoint:
            plan = checkpoint.plan_reads([checkpoint.request("model", "w", target)])
            counts = []
            for step in (
                lambda: plan.verify(lambda: None, room=room * SMALL_BLOCK + 1),
                lambda: plan.fill(lambda: None, verified=True),
                lambda: plan.fill(lambda: None, verified=True),  # nothing is held any more
            ):
                storage.count = 0
                step()
                counts.append(storage.count // windows)
                assert bool(target.any()) == (len(counts) > 1)
    few = blocks // 8 + 1  # which are not counted
    for count, expected in zip(counts, (blocks, again, blocks), strict=True):
        assert expected - few <= count <= expected
    assert same(target, values("U8", (blocks * SMALL_BLOCK,)))


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("started", range(pipeline._FETCHERS + pipeline._WORKERS))
def test_without_room_for_all_threads_one_does_it_all(
    far: bool, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(begun) == started:
            for each in begun:
                each.join(0.05)  # those that were started do what they can without the others
            raise MemoryError("no room for another thread")
        begun.append(thread)
        thread.start()

    monkeypatch.setattr(pipeline, "start_thread", start)
    size = 64 * SMALL_BLOCK
    with small_blocks():
        storage, manifest = save({"w": Layout("U8", (size,), None)})
        storage.far = far
        target = torch.zeros(size, dtype=torch.uint8)
        with Checkpoint(storage, "/t", manifest) as checkpoint:
            checkpoint.read([checkpoint.request("model", "w", target)])
    assert same(target, values("U8", (size,)))
    assert not any(each.is_alive() for each in begun)


def test_a_manifest_that_lies_about_a_file_is_found_before_any_byte_is_read() -> None:
    storage, manifest = save({"w": Layout("F32", (8,)), "x": Layout("F32", (4, 2))})
    lies: list[Any] = [
        Layout("F64", (8,)), Layout("F32", (2, 4)), Layout("F32", (9,)), Layout("F32", ()),
    ]  # fmt: skip
    for lie in lies:
        table = Captured().table
        table.roles["model"]["w"] = lie
        wrong = plan_save([(table, range(RANKS))]).roles["model"]["w"]
        manifest.tensors["model"]["w"] = wrong
        with Checkpoint(storage, "/t", manifest) as checkpoint, pytest.raises(CorruptShardError):
            checkpoint.tensor("model", "w")


def test_blocks_are_read_once_however_many_tensors_they_hold() -> None:
    tensors = {f"t{i}": Layout("F32", (5,)) for i in range(300)}
    storage, manifest = save(tensors)
    beats: list[None] = []
    with Checkpoint(storage, "/t", manifest) as checkpoint:
        targets = [torch.empty(5) for _ in tensors]
        requests = [
            checkpoint.request("model", k, t) for k, t in zip(tensors, targets, strict=True)
        ]
        plan = checkpoint.plan_reads(requests)
        plan.fill(lambda: beats.append(None))
    assert len(beats) == sum(name.startswith("model") for name in manifest.files)
    assert all(torch.equal(target, values("F32", (5,))) for target in targets)
