"""A small mixture of experts, whole or spread over ranks, and the same training of both.

Every token goes to the expert that its gate likes best, over whatever ranks: with all-to-all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.zero.training import whole
from zero_ckpt.zero import (
    clip_grad_norm_,
    declare_experts,
    gradient_sync_disabled,
    make_mesh,
    partition_optimizer,
    shard_module,
)

WIDTH = 6
EXPERTS = 4
LAYERS = 2


class Exchange(torch.autograd.Function):
    """Rows to the ranks of a group, `sent[i]` of them to rank i; gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, got: list[int], sent: list[int], group: Any
    ) -> torch.Tensor:
        ctx.way = got, sent, group
        out = rows.new_empty(sum(got), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), got, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        got, sent, group = ctx.way
        return Exchange.apply(grads[0], sent, got, group), None, None, None


class Expert(nn.Module):
    """With a buffer and a scalar, which nothing can shard."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 5)
        self.down = nn.Linear(5, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.down(torch.tanh(self.up(x))) * self.scale


class Mixture(nn.Module):
    """`mesh`: one dimension, over which the experts are spread; None: all are here."""

    def __init__(self, mesh: DeviceMesh | None, skip_idle: bool = False) -> None:
        super().__init__()
        self.mesh, self.skip_idle = mesh, skip_idle
        self.gate = nn.Linear(WIDTH, EXPERTS)
        count = EXPERTS // (1 if mesh is None else mesh.size())
        self.experts = nn.ModuleList(Expert() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, choice = self.gate(x).softmax(-1).max(-1)
        order = choice.argsort(stable=True)
        counts = choice.bincount(minlength=EXPERTS)
        y = self._through(x[order], counts)
        return x + weight[:, None] * torch.zeros_like(x).index_copy(0, order, y)

    def _through(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows in the order of their experts, `counts` for each."""
        if self.mesh is None:
            return self._run(rows.split(counts.tolist()))
        group, size, n = self.mesh.get_group(), self.mesh.size(), len(self.experts)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=group)
        sent, got = counts.view(size, n).sum(1).tolist(), theirs.view(size, n).sum(1).tolist()
        arrived = Exchange.apply(rows, got, sent, group)
        whose = torch.arange(n).repeat(size).repeat_interleave(theirs)
        order = whose.argsort(stable=True)
        parts = arrived[order].split(theirs.view(size, n).sum(0).tolist())
        y = self._run(parts)
        back = torch.zeros_like(y).index_copy(0, order, y)
        return Exchange.apply(back, sent, got, group)

    def _run(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        done = [
            part if self.skip_idle and not len(part) else expert(part)
            for expert, part in zip(self.experts, parts, strict=True)
        ]
        return torch.cat(done)


class Net(nn.Module):
    def __init__(self, mesh: DeviceMesh | None = None, **options: Any) -> None:
        super().__init__()
        self.inp = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(Mixture(mesh, **options) for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)

    @property
    def expert_lists(self) -> list[nn.ModuleList]:
        return [layer.experts for layer in self.layers]


def expert_mesh(size: int) -> DeviceMesh:
    shape = (dist.get_world_size() // size, size)
    return init_device_mesh("cpu", shape, mesh_dim_names=("expert_data", "expert"))


def make_net(seed: int = 0, **options: Any) -> Net:
    """All experts, in double precision, so that only a wrong computation differs by more than rounding."""
    torch.manual_seed(seed)
    return Net(**options).double()


def make_local(mesh: DeviceMesh, seed: int = 0, declare: bool = True, **options: Any) -> Net:
    """This rank's experts of `make_net(seed)`, declared."""
    full = make_net(seed)
    local = Net(mesh["expert"], **options).double()
    local.load_state_dict(local_part(full.state_dict(), mesh), strict=True)
    if declare:
        declare_experts(local, local.expert_lists, mesh)
    return local


def local_part(state: dict[str, torch.Tensor], mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Of a state of all experts, what this rank has, by its own names."""
    first = mesh.get_local_rank("expert") * EXPERTS // mesh.size(1)
    found = {}
    for name, tensor in state.items():
        head, mark, rest = name.partition(".experts.")
        number, _, tail = rest.partition(".")
        own = int(number) - first if mark else 0
        if 0 <= own < EXPERTS // mesh.size(1):
            found[f"{head}{mark}{own}.{tail}" if mark else name] = tensor
    return found


def batch(step: int, rank: int) -> torch.Tensor:
    """Rows of one step of one rank, [8, 3]."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 3, generator=generator, dtype=torch.double)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


@dataclass
class Trained:
    """`module`: sharded or not; `forward`: what is called."""

    module: Any
    forward: Any
    optimizer: Any
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def prepare(net: nn.Module, stage: int, **options: Any) -> Trained:
    forward: nn.Module = net
    if stage >= 2:
        shard_module(
            net, stage=stage, mesh=make_mesh(dist.get_world_size(), None, "cpu"), **options
        )
    else:
        forward = DistributedDataParallel(net)
    optimizer = adam(net)
    if stage == 1:
        optimizer = partition_optimizer(optimizer)
    return Trained(net, forward, optimizer)


def steps(run: Trained, count: int = 3, accumulate: int = 1, clip: float = 0.02) -> None:
    """Train on this rank's rows."""
    for step in range(count):
        for micro in range(accumulate):
            rows = batch(step * accumulate + micro, dist.get_rank())
            if micro < accumulate - 1:
                with gradient_sync_disabled(run.forward):
                    loss = backward(run.forward, rows, accumulate)
            else:
                loss = backward(run.forward, rows, accumulate)
            mean = torch.tensor(loss, dtype=torch.double)
            dist.all_reduce(mean)
            run.losses.append(mean.item() / dist.get_world_size())
        run.norms.append(clip_grad_norm_(run.module.parameters(), clip).item())
        run.optimizer.step()
        run.optimizer.zero_grad()


def reference(
    count: int = 3, accumulate: int = 1, clip: float = 0.02, ranks: int = 0, **options: Any
) -> Trained:
    """The same in one process with all experts, on the rows of all ranks, or of `ranks`."""
    ranks = ranks or dist.get_world_size()
    net = make_net(**options)
    run = Trained(net, net, adam(net))
    for step in range(count):
        for micro in range(accumulate):
            number = step * accumulate + micro
            rows = torch.cat([batch(number, rank) for rank in range(ranks)])
            run.losses.append(backward(net, rows, accumulate))
        run.norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip).item())
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run


def backward(forward: nn.Module, rows: torch.Tensor, accumulate: int) -> float:
    loss = (forward(rows) - rows.sum(-1, keepdim=True)).square().mean() / accumulate
    loss.backward()
    return float(loss.detach())


def everything(run: Trained, mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    """Weights and optimizer state that this rank has, whole, experts by their layers' numbers. Collective."""
    first = 0 if mesh is None else mesh.get_local_rank("expert") * EXPERTS // mesh.size(1)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in run.module.state_dict().items():
        found[renumbered(name, first)] = whole(tensor)
    inner = getattr(run.optimizer, "optim", run.optimizer)
    for name, parameter in run.module.named_parameters():
        for key, value in inner.state.get(parameter, {}).items():
            found[f"{renumbered(name, first)}/{key}"] = whole(value)
    return found


def renumbered(name: str, first: int) -> str:
    head, mark, rest = name.partition(".experts.")
    number, _, tail = rest.partition(".")
    return f"{head}{mark}{first + int(number)}.{tail}" if mark else name


def merged(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What all ranks have; what several have must be the same bitwise, but for buffers."""
    every: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            first = every.setdefault(name, tensor)
            assert name.endswith("seen") or torch.equal(first, tensor), name
    return every
