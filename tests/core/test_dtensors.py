"""Live DTensors in plain terms: every rank's box is the part of the global tensor that it really holds."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tests.workers import run_ranks
from zero_ckpt.core.chunks import Box
from zero_ckpt.core.dtensors import DTYPE_NAMES, layout_of, local_part, local_shape
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.errors import StateMismatchError

SHAPES = [(), (1,), (3,), (4,), (7,), (0,), (5, 3), (2, 9), (1, 1, 6), (4, 0)]


def placements_for(shape: tuple[int, ...], mesh_dims: int) -> list[tuple[Any, ...]]:
    kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    return list(product(kinds, repeat=mesh_dims))


def _boxes_are_what_torch_holds() -> int:
    rank, checked = dist.get_rank(), 0
    for mesh_shape in ((4,), (2, 2), (1, 4)):
        mesh = init_device_mesh("cpu", mesh_shape)
        for shape in SHAPES:
            whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
            for placements in placements_for(shape, len(mesh_shape)):
                tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
                local, box = local_part("t", tensor, layout_of("t", tensor), rank)
                assert box is not None
                assert torch.equal(local, whole[box.slices()])
                extent, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
                assert box.shape == extent == local_shape(shape, mesh, placements)
                assert not box.numel or box.offset == offset
                checked += 1
    return checked


def test_boxes_are_what_torch_holds() -> None:
    assert min(run_ranks(_boxes_are_what_torch_holds, 4)) > 100


def _strided() -> None:
    """FSDP over tensor parallelism: torch shards by TP first, and notes that with a split factor."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, rank = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), dist.get_rank()
    for shape, dim in product([(8, 3), (3, 8), (4, 4)], (0, 1)):
        if shape[dim] % 4:
            continue
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        placements = (_StridedShard(dim, split_factor=2), Shard(dim))
        extent, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
        held = whole[Box(offset, extent).slices()].contiguous()
        tensor = DTensor.from_local(
            held, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        layout = layout_of("t", tensor)
        assert layout.placements == (f"T{dim}", f"S{dim}")
        assert local_part("t", tensor, layout, rank)[1] == Box(offset, extent)
        gathered = whole.new_zeros(shape)
        gathered[Box(offset, extent).slices()] = held
        dist.all_reduce(gathered)
        assert torch.equal(gathered, whole)


def test_strided_shards_are_what_torch_holds() -> None:
    run_ranks(_strided, 4)


def _refused() -> dict[str, str]:
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    odd = DTensor.from_local(
        torch.ones(4),
        mesh,
        [_StridedShard(0, split_factor=2)],
        run_check=False,
        shape=torch.Size([8]),
        stride=(1,),
    )
    rows = dist.get_rank() + 1  # torch would put the longer part first
    uneven = DTensor.from_local(
        torch.ones(rows + 1, 2),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size([5, 2]),
        stride=(2, 1),
    )
    found = {}
    for name, tensor in {"partial": partial, "odd": odd, "uneven": uneven}.items():
        try:
            local_part(name, tensor, layout_of(name, tensor), dist.get_rank())
        except StateMismatchError as error:
            found[name] = str(error)
    return found


def test_tensors_whose_place_is_unknown_are_refused() -> None:
    """Partial sums, shards that are no box, and local parts that do not fit the global shape."""
    first, second = run_ranks(_refused, 2)
    assert first.keys() == second.keys() == {"partial", "odd", "uneven"}
    for name, text in first.items():
        assert f"'{name}'" in text


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(2, device="meta"), "meta device"),
        (torch.ones(2).to_sparse(), "sparse"),
    ],
    ids=["meta", "sparse"],
)
def test_tensors_that_cannot_be_stored_are_named(tensor: torch.Tensor, said: str) -> None:
    with pytest.raises(StateMismatchError, match=rf"tensor 'layer\.w'.*{said}"):
        layout_of("layer.w", tensor)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_named() -> None:
    tensor = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    with pytest.raises(StateMismatchError, match="tensor 'w' is a nested tensor"):
        layout_of("w", tensor)


class Wrapper(torch.Tensor):
    """Shows float32, and keeps another tensor: of the same values, or as quantized ones do."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        self: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        self.inner = inner
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [a.inner if isinstance(a, Wrapper) else a for a in args]
        return func(*args, **(kwargs or {}))


class Named(nn.Parameter):
    """A subclass that is only a name."""


def test_subclasses_that_keep_other_values_are_refused() -> None:
    with pytest.raises(StateMismatchError, match=r"'w' is a .*Wrapper.*cannot be stored bitwise"):
        layout_of("w", Wrapper(torch.ones(2, dtype=torch.int8)))
    for tensor in (Wrapper(torch.ones(2)), Named(torch.ones(2))):
        assert layout_of("w", tensor).shape == (2,)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_has_torchs_size() -> None:
    assert len(DTYPE_NAMES) >= 20
    for dtype, name in DTYPE_NAMES.items():
        assert torch.empty(0, dtype=dtype).element_size() == itemsize(name), name
