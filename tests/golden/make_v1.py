"""Made the checkpoints in `v1/`, once, with format version 1. Run from the root of the repository:

    python -m tests.golden.make_v1 NEW_FOLDER

The files in `v1/` stay as they are, whatever later versions write.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.golden import state
from tests.workers import run_ranks
from zero_ckpt import Checkpointer
from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.state_values import add_value

TRAINED = "global_step7"
TYPES = "types"


def save_trained(directory: str) -> None:
    """A sharded `Net` with its optimizer and scheduler, as training code saves it."""
    net = state.Net()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with torch.no_grad():
        for name, value in state.model_values().items():
            _fill(net.state_dict()[name], value)
        parameters = dict(net.named_parameters())
        for name, values in state.optimizer_values().items():
            parameter = parameters[name]
            optimizer.state[parameter] = {
                key: torch.empty_like(value if key == "step" else parameter)
                for key, value in values.items()
            }
            for key, value in values.items():
                _fill(optimizer.state[parameter][key], value)
    checkpointer = Checkpointer(net, optimizer, scheduler, rng=False)
    checkpointer.save_checkpoint(directory, client_state={"epoch": 3}, step=7)


def _fill(target: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)


def save_types(directory: str) -> None:
    """Every element type, every type of object, and every way in which a tensor may lie on two ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    model = {
        name: distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        for name, value in state.typed_tensors().items()
    }
    columns = state.numbers(50, 2, 4)
    model |= {
        "columns": distribute_tensor(columns, mesh, [Shard(1)]),
        "one_row": distribute_tensor(state.numbers(60, 1, 2), mesh, [Shard(0)]),
        "replicated": distribute_tensor(state.numbers(70, 3), mesh, [Replicate()]),
        "plain": state.numbers(80, 2),
        "number": torch.tensor(90.0),
        "empty": torch.empty(0, 4),
        f"only_on_{rank}": state.numbers(95 + rank, 2),
    }
    optim: dict[str, torch.Tensor] = {"columns/factor": state.numbers(110, 4)}
    for name, value in {"i": 3, "f": 0.25, "b": True, "n": None, "j": [columns, "x"]}.items():
        add_value(optim, f"plain/{name}", value)
    snapshot = Snapshot(
        model=model,
        optim=optim,
        objects={**state.objects(), "part": model["F32"]},
        rank_objects={"rank": rank, "tensor": state.numbers(rank, 2)},
        buffers=frozenset({"plain"}),
        frozen=frozenset({"number"}),
        aliases={"tied": "columns"},
        excluded=frozenset({"left_out"}),
    )
    engine = SyncEngine()
    for _ in range(2):  # the second generation
        engine.save(directory, TYPES, snapshot, step=8, zero_stage=2, save_latest=False)


def main(directory: Path) -> None:
    for save in (save_trained, save_types):
        run_ranks(save, 2, str(directory))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
