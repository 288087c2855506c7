"""Models and sharded checkpoints whose values a test can work out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.state import Snapshot

TAG = "global_step7"
PLACEMENTS: dict[str, Any] = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}


class Net(nn.Module):
    """Tied, frozen, low-precision, integer, 0-d, empty and buffer entries."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 7)
        self.half = nn.Linear(7, 5).bfloat16()
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(7)
        self.scale = nn.Parameter(torch.tensor(3.5, dtype=torch.float64))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(3).half(), requires_grad=False)
        self.phase: torch.Tensor
        self.register_buffer("phase", torch.randn(5).half())
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex64))


class NetWithExtraState(Net):
    """What `get_extra_state` returns is part of a strict state dict."""

    def get_extra_state(self) -> Any:
        return {"scales": [1.0, 2.5], "history": torch.arange(4)}

    def set_extra_state(self, state: Any) -> None:
        self.loaded_extra = state


def expected(model: nn.Module) -> dict[str, torch.Tensor]:
    """The fp32 state dict by the rule: only floating parameters narrower than fp32 change."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    narrow = (torch.bfloat16, torch.float16)
    return {
        key: value.detach().float() if key in parameters and value.dtype in narrow else value
        for key, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def assert_same(found: dict[str, Any], wanted: dict[str, torch.Tensor]) -> None:
    """Same keys, dtypes, shapes and bits."""
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert torch.equal(found[key], value.detach()), key


def sharded_values(rows: int = 61) -> dict[str, torch.Tensor]:
    """Odd sizes, larger and smaller than three ranks, in two dtypes."""
    torch.manual_seed(3)
    return {
        "rows": torch.randn(rows, 37),
        "columns": torch.randn(11, 29),
        "low": torch.randn(7, 5, 3).bfloat16(),
        "line": torch.randn(2),
        "whole": torch.randn(700, 1100),
        "step": torch.tensor(9),
    }


def save_sharded(directory: Path, rows: int = 61) -> None:
    """On every rank: a checkpoint whose tensors lie in parts on all of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: dict[str, torch.Tensor] = {}
    for key, value in sharded_values(rows).items():
        if value.ndim:
            placement = PLACEMENTS.get(key, Shard(0))
            model[key] = distribute_tensor(value, mesh, [placement])
        else:
            model[key] = value
    snapshot = Snapshot(model=model, buffers=frozenset({"step"}), aliases={"tied": "columns"})
    SyncEngine().save(str(directory), TAG, snapshot, step=7, zero_stage=3)


def sharded_expected(rows: int = 61) -> dict[str, torch.Tensor]:
    values = sharded_values(rows)
    return {**values, "low": values["low"].float(), "tied": values["columns"]}
