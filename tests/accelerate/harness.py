"""Small models and loops for tests that run Accelerate on real ranks.

Inside of `run_ranks` the process group and the variables of a launch exist already, and Accelerate uses both.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from torch import nn

from tests.lightning.harness import Block, assert_same, whole
from tests.workers import run_ranks
from zero_ckpt.accelerate import attach
from zero_ckpt.core.frameworks import unwrapped_optimizer
from zero_ckpt.core.naming import parameter_names
from zero_ckpt.core.state import capture_model

__all__ = [
    "Net",
    "assert_same",
    "batches",
    "fsdp2",
    "impatient",
    "make",
    "on_ranks",
    "state_of",
    "train",
]

FEATURES = 6


class Net(nn.Module):
    """Repeated blocks, buffers, a frozen parameter, tied weights."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(2)])
        self.norm = nn.BatchNorm1d(FEATURES, momentum=0.3)
        self.head = nn.Linear(FEATURES, 3, bias=False)
        self.tail = nn.Linear(FEATURES, 3, bias=False)
        self.tail.weight = self.head.weight
        self.shift = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(x) + self.tail(x) + self.shift
        return result


def batches(count: int, start: int = 0) -> list[torch.Tensor]:
    """This rank's inputs of steps `start` and after."""
    rank = dist.get_rank()
    return [
        torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(100 * step + rank))
        for step in range(start, start + count)
    ]


def fsdp2(plugin: dict[str, Any] | None = None, replicate: int = 1) -> Accelerator:
    """An accelerator with Accelerate's own FSDP2 on the CPU, where Accelerate never chooses it by itself."""
    accelerator = Accelerator(cpu=True)
    chosen = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        **(plugin or {}),
    )
    state: Any = accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = chosen
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if replicate > 1:
        state.parallelism_config = ParallelismConfig(
            dp_replicate_size=replicate, dp_shard_size=dist.get_world_size() // replicate
        )
        state.device_mesh = state.parallelism_config.get_device_mesh("cpu")
    return accelerator


def make(
    kind: int | str | None = None, *, seed: int = 0, net: type[nn.Module] = Net, **options: Any
) -> tuple[Any, Any, Any, Any]:
    """(accelerator, model, optimizer, scheduler), prepared. `kind`: a stage, "fsdp2" or "hsdp"; others are plain."""
    given = {name: options.pop(name) for name in list(options) if name in ATTACH}
    if kind == "fsdp2":
        accelerator = attach(fsdp2(), **given)
    elif kind == "hsdp":
        accelerator = attach(fsdp2(replicate=2), **given)
    else:
        stage = kind if isinstance(kind, int) else None
        accelerator = attach(Accelerator(cpu=True, **options), stage=stage, **given)
    torch.manual_seed(seed)
    model = net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
    return (accelerator, *accelerator.prepare(model, optimizer, scheduler))


ATTACH = frozenset(
    {"export", "export_format", "max_shard_size", "keep_last", "timeout", "tag_validation"}
    | {"wrap", "sharding_size", "cpu_offload", "async_save"}
)


def train(made: tuple[Any, Any, Any, Any], inputs: list[torch.Tensor]) -> list[float]:
    """Steps with gradient accumulation, as a user writes them; the losses."""
    accelerator, model, optimizer, scheduler = made
    losses = []
    for x in inputs:
        with accelerator.accumulate(model):
            loss = (model(x) - 1).pow(2).mean()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def state_of(made: tuple[Any, Any, Any, Any]) -> dict[str, Any]:
    """Whole weights and optimizer state by name, groups' options and the scheduler. Collective.

    Without buffers where rank 0's will replace them: on other ranks, unless Accelerate's FSDP shards.
    """
    accelerator, _, _, scheduler = made
    model = next(iter(accelerator.zero_models().values()))
    state = capture_model(model)
    weights = {key: whole(t).clone() for key, t in state.tensors.items()}
    if dist.get_rank() and accelerator.distributed_type != DistributedType.FSDP:
        weights = {key: t for key, t in weights.items() if key not in state.buffers}
    optimizer = unwrapped_optimizer(accelerator._optimizers[0])
    names = parameter_names(model)
    holder: Any = getattr(optimizer, "optim", optimizer)
    own = {
        f"{names[id(p)]}/{key}": whole(value).clone()
        for p, values in holder.state.items()
        for key, value in values.items()
    }
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {
        "weights": weights,
        "optimizer": {key: value for part in parts for key, value in part.items()},
        "options": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "scheduler": scheduler.state_dict(),
    }


def impatient(accelerator: Any, seconds: float | None = 1.0) -> None:
    """How long it waits for silent ranks from now on; None as ever. Only for calls that some rank does not make."""
    accelerator._zero_options = dataclasses.replace(accelerator._zero_options, timeout=seconds)


def on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """`run_ranks` with advice of Accelerate and torch switched off."""
    return run_ranks(_quietly, world_size, fn, args, timeout=timeout)


def _quietly(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    warnings.filterwarnings("ignore", module=r"(accelerate|torch)(\.|$)")
    return fn(*args)
