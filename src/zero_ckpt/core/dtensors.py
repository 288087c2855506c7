"""Live tensors in plain terms: dtype names, layouts, local boxes and raw bytes of torch tensors and DTensors.

The only module of the core that looks inside a DTensor. It copies no tensor and sends no message.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard
from torch.nn.parameter import is_lazy

from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.dtypes import TORCH_NAMES
from zero_ckpt.core.layout import Layout, Mesh, local_box
from zero_ckpt.errors import FormatVersionError, StateMismatchError

__all__ = [
    "DTYPE_NAMES",
    "TORCH_DTYPES",
    "address_of",
    "dtensor_from",
    "layout_of",
    "local_part",
    "local_shape",
    "local_tensor",
]

DTYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, attribute): name
    for attribute, name in {**TORCH_NAMES, "float4_e2m1fn_x2": "F4_E2M1X2"}.items()
    if hasattr(torch, attribute)
}
"""torch dtype -> the name that checkpoints use. Types that this torch lacks are absent."""


class _TorchDtypes(dict[str, torch.dtype]):
    def __missing__(self, name: str) -> torch.dtype:
        raise FormatVersionError(
            f"the checkpoint holds a tensor of type {name}, which torch {torch.__version__} does not have. "
            "Load it with a newer torch."
        )


TORCH_DTYPES = _TorchDtypes({name: dtype for dtype, name in DTYPE_NAMES.items()})
"""The reverse of `DTYPE_NAMES`. Looking up a type that this torch lacks raises `FormatVersionError`."""

_USUAL = (torch.Tensor, torch.nn.Parameter)

_meshes: dict[int, tuple[Any, Mesh, int | None, bool]] = {}
_mesh_layouts: dict[tuple[Any, ...], tuple[Any, Layout]] = {}
"""Layouts by what determines them, each with its mesh: while that is kept, no other one can have the id in the key."""


def _mesh_of(device_mesh: Any) -> Mesh:
    """The `Mesh` of a torch `DeviceMesh`, computed once for each."""
    return _known_mesh(device_mesh)[1]


def _known_mesh(device_mesh: Any) -> tuple[Any, Mesh, int | None, bool]:
    """(a `DeviceMesh`, its `Mesh`, this process's rank in it or None for an outsider, whether ranks are in order)."""
    known = _meshes.get(id(device_mesh))
    if known is None or known[0] is not device_mesh:
        tensor = device_mesh.mesh
        mesh = Mesh(tuple(tensor.shape), tuple(tensor.flatten().tolist()))
        coordinate = device_mesh.get_coordinate()
        own = None if coordinate is None else int(tensor[tuple(coordinate)])
        in_order = own is None or _is_in_order(device_mesh, tuple(coordinate))
        known = _meshes[id(device_mesh)] = (device_mesh, mesh, own, in_order)
    return known


def _is_in_order(device_mesh: Any, coordinate: tuple[int, ...]) -> bool:
    """Whether torch gives parts to ranks in the order in which the mesh lists them: process groups may sort ranks."""
    ranks = device_mesh.mesh
    for dim in range(ranks.ndim):
        at = (*coordinate[:dim], slice(None), *coordinate[dim + 1 :])
        line = ranks[at].tolist()
        ascending = line == sorted(line) or not dist.is_initialized()
        if not ascending and line != dist.get_process_group_ranks(device_mesh.get_group(dim)):
            return False
    return True


@lru_cache(maxsize=65536)
def _plain_layout(dtype: str, shape: tuple[int, ...], whole: bool) -> Layout:
    return Layout(dtype, shape, whole=whole)


def _mesh_layout(
    dtype: str, shape: tuple[int, ...], mesh: Mesh, placements: tuple[Placement, ...], whole: bool
) -> Layout:
    names = tuple(_placement_name(p) for p in placements)
    for index, placement in enumerate(placements):
        factor = getattr(placement, "split_factor", 1)
        if factor != _pieces_behind(names, mesh.shape, index):
            raise TypeError(f"placement {placement}, whose parts are no boxes on this mesh")
    return Layout(dtype, shape, mesh, names, whole)


def _pieces_behind(names: tuple[str, ...], mesh_shape: tuple[int, ...], index: int) -> int:
    """Into how many pieces later mesh dimensions cut a strided shard's tensor dimension; 1 for other placements."""
    if names[index][0] != "T":
        return 1
    dim = names[index][1:]
    behind = range(index + 1, len(names))
    return prod(mesh_shape[i] for i in behind if names[i][1:] == dim)


def _placement_name(placement: Placement) -> str:
    if isinstance(placement, Replicate):
        return "R"
    # A strided shard is not a Shard to `isinstance` in every torch version; it always has a dimension to split.
    split: Any = placement
    if hasattr(split, "split_factor"):
        return f"T{split.dim}"
    if isinstance(placement, Shard):
        return f"S{placement.dim}"
    raise TypeError(f"placement {placement}")


def layout_of(key: str, tensor: torch.Tensor, whole: bool = False) -> Layout:
    """How `tensor` lies on the ranks; `whole`: see `Layout`.

    Raises `StateMismatchError`, naming `key`, for a tensor that cannot be stored.
    """
    local = local_tensor(tensor)
    is_dense = local.layout is torch.strided and not local.is_meta and not local.is_nested
    if not is_dense or type(local) not in _USUAL:
        _check_storable(key, tensor, local)
    dtype = local.dtype
    if not isinstance(tensor, DTensor):
        return _plain_layout(_dtype_name(key, dtype), tuple(tensor.shape), whole)
    mesh, placements = tensor.device_mesh, tensor.placements
    alike = dtype, tensor.shape, id(mesh), placements, whole
    known = _mesh_layouts.get(alike)
    if known is not None:
        return known[1]
    try:
        layout = _mesh_layout(
            _dtype_name(key, dtype), tuple(tensor.shape), _mesh_of(mesh), placements, whole
        )
    except TypeError as error:
        raise StateMismatchError(
            f"tensor '{key}' is a DTensor with {error}: reduce it (full_tensor() or redistribute) before saving"
        ) from error
    _mesh_layouts[alike] = mesh, layout
    return layout


def _dtype_name(key: str, dtype: torch.dtype) -> str:
    name = DTYPE_NAMES.get(dtype)
    if name is None:
        raise StateMismatchError(f"tensor '{key}' has dtype {dtype}, which cannot be stored")
    return name


def _check_storable(key: str, tensor: torch.Tensor, local: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise StateMismatchError(f"tensor '{key}' is {kind}; only dense tensors can be stored")
    if tensor.is_meta:
        raise StateMismatchError(
            f"tensor '{key}' is on the meta device: it has no values. Materialize it first (module.to_empty())"
        )
    if is_lazy(tensor):
        raise StateMismatchError(
            f"tensor '{key}' of a lazy module has no shape yet: run the module once first"
        )
    if type(local) not in _USUAL and not _keeps_values(local):
        raise StateMismatchError(
            f"tensor '{key}' is a {type(local).__module__}.{type(local).__qualname__}, which keeps its values in a "
            "form of its own (quantized, for example) that cannot be stored bitwise. Of a weight, leave it out "
            "(exclude_frozen_parameters); of an optimizer, use one whose state is plain tensors"
        )


def _keeps_values(tensor: Any) -> bool:
    """Whether a tensor of another class holds its values as they are, and not quantized, say.

    A wrapper does when a tensor inside it has the wrapper's own dtype and shape.
    """
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return True
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return any(t.dtype == tensor.dtype and t.shape == tensor.shape for t in inner)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, sharing memory; the tensor itself when it is no DTensor."""
    # `to_local()` is the public way, and costs ten times this: it enters and leaves two autograd modes.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def address_of(tensor: torch.Tensor) -> int:
    """The address of the tensor's values if they lie in host memory, unchanged and in row-major order; else 0."""
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return 0
    return tensor.data_ptr()  # 0 for a wrapper around other tensors


@lru_cache(maxsize=65536)
def _box_at(layout: Layout, rank: int) -> Box | None:
    mesh = layout.mesh
    if mesh is None:
        return full_box(layout.shape)
    for owner, coordinate in mesh.coordinates():
        if owner == rank:
            return local_box(layout.shape, mesh.shape, layout.placements, coordinate)
    return None


def local_part(
    key: str, tensor: torch.Tensor, layout: Layout, rank: int
) -> tuple[torch.Tensor, Box | None]:
    """This rank's part of `tensor` and its box of the global tensor; None for a rank outside of the mesh.

    Raises `StateMismatchError` when the part has another shape than the mesh and placements imply, and when this
    process is not `rank` any more.
    """
    local, box = local_tensor(tensor), _box_at(layout, rank)
    if isinstance(tensor, DTensor):
        _check_rank(key, tensor, rank)
    if layout.mesh is not None and box is not None and local.shape != box.shape and box.numel:
        raise StateMismatchError(
            f"tensor '{key}': rank {rank} holds a local part of shape {list(local.shape)}, but global shape "
            f"{list(layout.shape)} with placements {list(layout.placements)} implies {list(box.shape)}. "
            "Was it built with DTensor.from_local from uneven shards? Give it the true global shape and stride."
        )
    return local, box


def _check_rank(key: str, tensor: DTensor, rank: int) -> None:
    """Without its group every process takes itself for rank 0, and its part for that of rank 0."""
    _, mesh, own, in_order = _known_mesh(tensor.device_mesh)
    if own == rank and in_order and dist.is_initialized():
        return  # of many tensors each comes here
    if not in_order and not all(isinstance(p, Replicate) for p in tensor.placements):
        raise StateMismatchError(
            f"tensor '{key}' is sharded over a mesh of ranks {list(mesh.ranks)}, which its process groups have in "
            "another order: which rank has which part is not what the mesh says. Make the mesh of ascending ranks."
        )
    is_alone = len(mesh.ranks) > 1 and not dist.is_initialized()
    if is_alone or (own != rank and not (own is None and rank not in mesh.ranks)):
        raise StateMismatchError(
            f"tensor '{key}' is sharded over {len(mesh.ranks)} ranks, of which this process is rank {own}, and it "
            f"saves or loads as rank {rank}: its process group is gone, or is not the one that saves and loads. "
            "Save and load before the process group is destroyed."
        )


def local_shape(
    shape: tuple[int, ...], device_mesh: Any, placements: tuple[Placement, ...]
) -> tuple[int, ...]:
    """The shape of this rank's part of a tensor of `shape`; all zeros for a rank outside of the mesh."""
    coordinate = device_mesh.get_coordinate()
    if coordinate is None:
        return (0,) * len(shape)
    names = tuple(_placement_name(p) for p in placements)
    return local_box(shape, _mesh_of(device_mesh).shape, names, tuple(coordinate)).shape


def dtensor_from(
    local: torch.Tensor,
    shape: tuple[int, ...],
    device_mesh: Any,
    placements: tuple[Placement, ...],
) -> DTensor:
    """A DTensor of global `shape` whose local part is `local`; what `DTensor.from_local` makes without its checks."""
    spec = _spec(shape, local.dtype, device_mesh, placements, tuple(local.shape))
    made: DTensor = DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


@lru_cache(maxsize=65536)
def _spec(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device_mesh: Any,
    placements: tuple[Placement, ...],
    part: tuple[int, ...],
) -> Any:
    """What a DTensor knows beside its local part. Cached: layers repeat, and `from_local` is slow to find it out."""
    stride = torch.empty(shape, device="meta").stride()
    local = torch.empty(part, dtype=dtype, device="meta")
    made = DTensor.from_local(
        local, device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made._spec
