"""The state that a module starts with: real instead of meta, and rank 0's on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from zero_ckpt.core.dtensors import local_tensor
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero.sync import buckets

__all__ = ["broadcast_from_first", "materialize", "mesh_device", "require_initializers"]

Initializer = Callable[[], object]


def require_initializers(root: nn.Module) -> None:
    """Raise `ConfigurationError` naming the modules under `root` that `materialize` would refuse."""
    missing = [
        f"{name or '(root)'} ({type(module).__name__})"
        for name, module in root.named_modules()
        if _is_pending(module)
        and not _own_initializer(module)
        and not _initializer_around(root, name, module)
    ]
    if missing:
        raise ConfigurationError(
            f"On the meta device, without a way to be initialized: {', '.join(missing)}. {_REMEDY}"
        )


_REMEDY = (
    "Define reset_parameters() on their classes, which sets every parameter and buffer that the "
    "module itself owns, or create the model on a real device."
)


def materialize(root: nn.Module, modules: Iterable[nn.Module], device: torch.device) -> None:
    """Give the meta tensors that `modules` (of the tree under `root`) own memory and initial values.

    Tied parameters stay tied when all of their owners are in `modules`. Values come from the
    module's `reset_parameters` (or `_reset_parameters`), and then from the `_init_weights(module)`
    of the innermost module around it that has one (Hugging Face's convention, and a common one).
    What was a DTensor is initialized whole and then cut, so that its values do not depend on how
    many ranks there are; this is collective over its mesh, whose first rank's values count.

    Raises `ConfigurationError` naming the floating-point tensors that these left without a value.
    """
    pending = [m for m in modules if _is_pending(m)]
    if not pending:
        return
    names = {module: name for name, module in root.named_modules()}
    real: dict[torch.Tensor, torch.Tensor] = {}  # by the meta tensor in whose place it stands
    for module in pending:
        _allocate(module, device, real)
    # As when the model was built: children before parents, all of that before the model's own
    # convention. And backwards, so that among tied layers the model's first has the last word.
    backwards = list(reversed(pending))
    own = [_own_initializer(module) for module in backwards]
    around = [_initializer_around(root, names[module], module) for module in backwards]
    for initialize in (*own, *around):
        if initialize is not None:
            initialize()
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in real.values()):
        kinds = sorted({f"{names[m] or '(root)'} ({type(m).__name__})" for m in pending})
        raise ConfigurationError(
            "Initializing meta modules left tensors without a value, in one of: "
            f"{', '.join(kinds)}. {_REMEDY}"
        )
    cut = {
        whole: _cut_like(whole, meta) for meta, whole in real.items() if isinstance(meta, DTensor)
    }
    for module in pending:
        _exchange(module, cut)


def _is_pending(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(t is not None and t.is_meta for t in tensors)


def _own_initializer(module: nn.Module) -> Initializer | None:
    for name in ("reset_parameters", "_reset_parameters"):
        reset: Initializer | None = getattr(module, name, None)
        if callable(reset):
            return reset
    return None


def _initializer_around(root: nn.Module, name: str, module: nn.Module) -> Initializer | None:
    path = name.split(".") if name else []
    for length in range(len(path), -1, -1):
        around = getattr(root.get_submodule(".".join(path[:length])), "_init_weights", None)
        if callable(around):
            return functools.partial(around, module)
    return None


def _allocate(
    module: nn.Module, device: torch.device, real: dict[torch.Tensor, torch.Tensor]
) -> None:
    """Replace a module's own meta tensors by whole ones, in which NaN stands for "no value"."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.is_meta and tensor not in real:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if memory.is_floating_point() and memory.element_size() > 1:
                memory.fill_(torch.nan)
            real[tensor] = _as_kind(memory, tensor)
    _exchange(module, real)


def _as_kind(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter when `tensor` is one, with the attributes that its makers gave it."""
    if not isinstance(tensor, nn.Parameter):
        return memory
    parameter = nn.Parameter(memory, tensor.requires_grad)
    parameter.__dict__.update(tensor.__dict__)
    return parameter


def _exchange(module: nn.Module, by: Mapping[torch.Tensor, torch.Tensor]) -> None:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor in by:
                tensors[name] = by[tensor]  # type: ignore[assignment]


def _cut_like(whole: torch.Tensor, meta: DTensor) -> torch.Tensor:
    """This rank's part of `whole`, as a DTensor placed as `meta` is."""
    mesh, placements = meta.device_mesh, meta.placements
    broadcast_from_first([whole], mesh)
    shape, offset = compute_local_shape_and_global_offset(meta.shape, mesh, placements)
    part = whole.detach()
    for dimension, (start, length) in enumerate(zip(offset, shape, strict=True)):
        part = part.narrow(dimension, min(start, part.shape[dimension]), length)
    placed = DTensor.from_local(
        part.clone(memory_format=torch.contiguous_format),
        mesh,
        placements,
        run_check=False,
        shape=meta.shape,
        stride=meta.stride(),
    )
    return _as_kind(placed, whole)


@torch.no_grad()
def broadcast_from_first(tensors: Sequence[torch.Tensor], mesh: DeviceMesh) -> None:
    """Overwrite tensors with those of the mesh's first rank. Collective over the mesh.

    Works wherever the tensors live: they travel in buckets over the mesh's device. A DTensor (of a
    mesh with more dimensions, such as tensor parallelism) has its local part broadcast. Unnoticed
    by autograd, as DDP's broadcast of buffers is: a backward pass may still wait for what an
    earlier forward pass has kept of them.
    """
    for bucket in buckets([local_tensor(t).detach() for t in tensors if t.numel()]):
        # As bytes: not every backend knows every dtype.
        parts = [t.contiguous().view(-1).view(torch.uint8) for t in bucket]
        flat = torch.cat(parts).to(mesh_device(mesh))
        for dimension in range(mesh.ndim):
            # First along columns, so that the next pass spreads the very first rank's along rows.
            group = mesh.get_group(dimension)
            dist.broadcast(flat, src=dist.get_global_rank(group, 0), group=group)
        for tensor, part in zip(bucket, torch.split(flat, [p.numel() for p in parts]), strict=True):
            # Through .data, whose writes do not count as changes.
            tensor.data.copy_(part.view(tensor.dtype).view(tensor.shape))


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """The device of this rank on which a mesh communicates and computes."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    current = torch.get_device_module(mesh.device_type).current_device()
    return torch.device(mesh.device_type, current)
