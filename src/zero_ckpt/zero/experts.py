"""Expert parallelism: lists of experts that differ from rank to rank, declared with one call.

    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("expert_data", "expert"))
    declare_experts(model, [block.experts for block in model.blocks], mesh)

From then on a checkpoint calls each expert by its number in the layer, and no function of this package takes the
experts of one rank for copies of another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from zero_ckpt.core.experts import Share, set_share, share_of
from zero_ckpt.core.naming import dotted
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero.expert_gradients import ExpertGradients
from zero_ckpt.zero.sync import switch_gradients_of

__all__ = [
    "ExpertMesh",
    "attach_experts",
    "declare_experts",
    "expert_lists",
    "expert_parameters",
    "mesh_of_experts",
    "shared_buffers",
]

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMesh:
    """Where experts are: different ones along dimension `dim` of `mesh`. `replicas`: ranks with the same ones."""

    mesh: DeviceMesh
    dim: int
    replicas: DeviceMesh

    @property
    def parts(self) -> int:
        return int(self.mesh.size(self.dim))


_declared: WeakKeyDictionary[nn.Module, ExpertMesh] = WeakKeyDictionary()
_averaging: WeakKeyDictionary[nn.Module, ExpertGradients] = WeakKeyDictionary()


def declare_experts(
    model: nn.Module,
    experts: nn.ModuleList | Iterable[nn.ModuleList],
    mesh: DeviceMesh,
    *,
    mesh_dim: int | str = -1,
) -> None:
    """Say which lists in `model` hold experts that other ranks do not have. Collective over all ranks.

    `experts`: one list or several, each with the same number n of experts on every rank. `mesh`: all data-parallel
    ranks, in one or two dimensions. Along `mesh_dim` (by name or number; the last one by default) ranks hold different
    experts: entry `i` of a list of the rank at place `r` is the layer's expert `r * n + i`. Along the other dimension
    ranks hold the same ones.

    Call it before the model is wrapped in DistributedDataParallel, sharded or given to a framework, with the module
    that will be. Gradients of experts are then those of the loss averaged over all ranks, given that each rank of the
    mesh has a batch of its own and backward passes bring every token's gradient to its expert.

    Raises `ConfigurationError`, the same on every rank and without any effect, for lists that overlap, are empty, are
    not in the model, share a parameter with another module, or are not alike on all ranks.
    """
    lists = [experts] if isinstance(experts, nn.ModuleList) else list(experts)
    problem, signature = "", {}
    try:
        dim = _dimension(mesh, mesh_dim)
        signature = _signature(_paths(model, lists, mesh))
    except ConfigurationError as error:
        problem = str(error)
    _check_alike(_gathered(mesh, (dist.get_rank(), problem, signature)))
    place = ExpertMesh(mesh, dim, _replicas(mesh, dim))
    rank = mesh.get_local_rank(dim)
    for each in lists:
        _declared[each] = place
        set_share(each, Share(rank * len(each), len(each), place.parts * len(each)))
    attach_experts(model)


def _dimension(mesh: DeviceMesh, mesh_dim: int | str) -> int:
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 2:
        raise ConfigurationError(
            f"the mesh of experts has {mesh.ndim} dimensions, {names}; expected one, or two with one for replicas"
        )
    if isinstance(mesh_dim, str):
        if mesh_dim not in names:
            raise ConfigurationError(f"mesh_dim={mesh_dim!r}: the mesh has the dimensions {names}")
        return names.index(mesh_dim)
    if not -mesh.ndim <= mesh_dim < mesh.ndim:
        raise ConfigurationError(f"mesh_dim={mesh_dim}: the mesh has {mesh.ndim} dimension(s)")
    return mesh_dim % mesh.ndim


def _paths(
    model: nn.Module, lists: Sequence[nn.ModuleList], mesh: DeviceMesh
) -> dict[str, nn.ModuleList]:
    """The lists by their names in the model. Raises `ConfigurationError` for what cannot be declared."""
    names = {id(module): name for name, module in model.named_modules()}
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConfigurationError(
            "the model is wrapped in DistributedDataParallel, which would average different experts: declare "
            "experts before it is wrapped"
        )
    found: dict[str, nn.ModuleList] = {}
    for each in lists:
        if not isinstance(each, nn.ModuleList) or id(each) not in names:
            raise ConfigurationError(
                f"a {type(each).__name__} was declared as experts: expected ModuleLists of the model"
            )
        name = names[id(each)]
        if not len(each):
            raise ConfigurationError(f"'{name}' is an empty list of experts")
        if name in found:
            raise ConfigurationError(f"'{name}' is declared twice")
        before = _declared.get(each)
        if before is not None and before.mesh != mesh:
            raise ConfigurationError(f"'{name}' is declared already, over another mesh")
        found[name] = each
    _check_apart(model, found)
    return found


def _check_apart(model: nn.Module, lists: dict[str, nn.ModuleList]) -> None:
    """Refuse lists that lie in one another, and experts that share a tensor with anything else."""
    before = {name: each for name, each in model.named_modules() if each in _declared}
    home: dict[int, tuple[str, str]] = {}
    for name, tensor in _tensors(model):
        around = [path for path in {**before, **lists} if name.startswith(dotted(path))]
        if len(around) > 1:
            raise ConfigurationError(
                f"the lists of experts {' and '.join(map(repr, around))} overlap: both hold '{name}'"
            )
        owner, first = home.setdefault(id(tensor), (around[0] if around else "", name))
        if owner != (around[0] if around else ""):
            raise ConfigurationError(
                f"'{first}' and '{name}' are one tensor: experts that live on different ranks cannot share a tensor "
                "with anything else"
            )


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _signature(lists: dict[str, nn.ModuleList]) -> dict[str, Any]:
    """What must be the same on all ranks: paths, numbers of experts, and names, dtypes and shapes of their tensors."""
    return {
        path: (len(each), [(name, str(t.dtype), tuple(t.shape)) for name, t in _tensors(each)])
        for path, each in lists.items()
    }


def _gathered(mesh: DeviceMesh, own: Any) -> list[Any]:
    """What every rank of the mesh brings, the same list on all of them."""
    known = [own]
    for dimension in range(mesh.ndim):
        parts: list[Any] = [None] * mesh.size(dimension)
        dist.all_gather_object(parts, known, group=mesh.get_group(dimension))
        known = [item for part in parts for item in part]
    return sorted(known, key=lambda item: item[0])


def _check_alike(records: list[tuple[int, str, dict[str, Any]]]) -> None:
    for rank, problem, _ in records:
        if problem:
            same = all(other == problem for _, other, _ in records)
            raise ConfigurationError(problem if same else f"rank {rank}: {problem}")
    first_rank, _, first = records[0]
    for rank, _, lists in records:
        if list(lists) != list(first):
            raise ConfigurationError(
                f"rank {first_rank} declares the experts {list(first)}, rank {rank} {list(lists)}: declare the same "
                "lists on every rank, in the same order"
            )
        for path, (count, tensors) in lists.items():
            if count != first[path][0]:
                raise ConfigurationError(
                    f"'{path}' has {first[path][0]} experts on rank {first_rank} and {count} on rank {rank}: every "
                    "rank must have the same number"
                )
            if tensors != first[path][1]:
                raise ConfigurationError(
                    f"the experts of '{path}' have other tensors on rank {rank} than on rank {first_rank}: entries of "
                    "equal number must be alike on all ranks"
                )


def _replicas(mesh: DeviceMesh, dim: int) -> DeviceMesh:
    """The ranks that hold the same experts as this one."""
    if mesh.ndim == 1:
        # A dimension of size 1, so that every stage finds a mesh to shard an expert over.
        mesh, dim = DeviceMesh(mesh.device_type, mesh.mesh.unsqueeze(0)), 1
    return DeviceMesh.from_group(mesh.get_group(1 - dim), mesh.device_type)


def expert_lists(root: nn.Module) -> dict[str, nn.ModuleList]:
    """The declared lists under `root`, by their paths.

    Raises `ConfigurationError` for a copy of a declared list: checkpoints name it right, but nobody averages its
    gradients.
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and share_of(module) is not None:
            if module not in _declared:
                raise ConfigurationError(
                    f"'{path}' is a copy of a list of experts: declare the copy too before it is trained"
                )
            found[path] = module
    return found


def mesh_of_experts(experts: nn.Module) -> ExpertMesh:
    """Where a declared list's experts are."""
    return _declared[experts]


def expert_parameters() -> dict[torch.Tensor, ExpertMesh]:
    """Every parameter of every declared expert, as it is now, and where the expert is."""
    return {p: place for experts, place in _declared.items() for p in experts.parameters()}


def shared_buffers(root: nn.Module) -> list[torch.Tensor]:
    """The buffers that all ranks have in common: those outside of declared experts."""
    own = {id(b) for experts in _declared for b in experts.buffers()}
    return [b for b in dict.fromkeys(root.buffers()) if id(b) not in own]


def attach_experts(root: nn.Module) -> None:
    """Keep DistributedDataParallel off the experts under `root`, and average their gradients where they belong.

    To be called again when parameters were replaced or another module will be wrapped. Sharded parameters are left to
    FSDP2.
    """
    by_place: dict[ExpertMesh, list[nn.ModuleList]] = {}
    for path, experts in expert_lists(root).items():
        by_place.setdefault(_declared[experts], []).append(experts)
        ignored = {f"{path}.{name}" for name, _ in _tensors(experts)}
        setattr(root, _IGNORED_BY_DDP, ignored | set(getattr(root, _IGNORED_BY_DDP, ())))
    for place, lists in by_place.items():
        if lists[0] in _averaging:
            _averaging.pop(lists[0]).close()
        each = [(e, p) for experts in lists for e in experts for p in e.parameters()]
        own = {p: isinstance(e, FSDPModule) for e, p in each if not isinstance(p, DTensor)}
        if own:
            every = [p for p in root.parameters() if not isinstance(p, DTensor)]
            divided = [p for p, is_sharded in own.items() if not is_sharded]
            gradients = ExpertGradients(list(own), every, divided, place.parts, place.replicas)
            _averaging[lists[0]] = gradients
            switch_gradients_of(lists[0], gradients)
