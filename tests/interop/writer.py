"""Checkpoints laid out as DeepSpeed lays them out, made from known tensors: cut and padded with torch, rank by rank.

Independent of the reader: it concatenates, pads and splits real tensors, and knows no addresses.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


class ZeroStageEnum(IntEnum):
    optimizer_states = 1
    gradients = 2
    weights = 3


class fragment_address:
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale, self.dynamic = 1.0, False


_HOMES = {
    ZeroStageEnum: "deepspeed.runtime.zero.config",
    fragment_address: "deepspeed.utils.tensor_fragment",
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
}


@contextlib.contextmanager
def deepspeed_classes() -> Iterator[None]:
    """While this is open, the classes above are pickled as DeepSpeed's own."""
    made: list[str] = []
    try:
        for kind, home in _HOMES.items():
            parts = home.split(".")
            for path in (".".join(parts[:n]) for n in range(1, len(parts) + 1)):
                if path not in sys.modules:
                    sys.modules[path] = types.ModuleType(path)
                    made.append(path)
            kind.__module__ = home
            setattr(sys.modules[home], kind.__name__, kind)
        yield
    finally:
        for path in made:
            del sys.modules[path]


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a file holds."""
    with deepspeed_classes():
        tree = torch.load(path, weights_only=False)
        change(tree)
        torch.save(tree, path)


@dataclass
class Run:
    """What the run held. `groups`: masters of each parameter group; `states`: name -> parameter -> tensor."""

    groups: Sequence[Tensors]
    states: Mapping[str, Tensors]
    world: int
    stage: int
    dtype: torch.dtype = torch.float32
    buffers: Tensors = field(default_factory=dict)
    frozen: Tensors = field(default_factory=dict)
    aligned: bool = False
    round_robin: bool = False
    keeps_padding: bool = False
    sub_group_size: int = 1 << 40
    step: float | None = 3.0
    client_state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def masters(self) -> dict[str, torch.Tensor]:
        return {name: value for group in self.groups for name, value in group.items()}


def write(run: Run, folder: Path, serialization: bool = True) -> None:
    """Write every rank's files. `serialization` False: torch's older file format."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Stage3(run) if run.stage == 3 else _Stage12(run)
    with deepspeed_classes():
        for name, tree in writer.files():
            torch.save(tree, folder / name, _use_new_zipfile_serialization=serialization)


def _shapes(names: Sequence[str], tensors: Tensors) -> OrderedDict[str, torch.Size]:
    return OrderedDict((name, tensors[name].shape) for name in names)


@dataclass
class _Writer:
    run: Run

    def common(self) -> dict[str, Any]:
        run = self.run
        config = {
            "zero_optimization": {"stage": run.stage, "round_robin_gradients": run.round_robin},
            "bf16": {"enabled": run.dtype == torch.bfloat16},
        }
        return {
            "buffer_names": list(run.buffers),
            "optimizer": None,
            "shared_params": {},
            "lr_scheduler": None,
            "global_steps": 3,
            "dp_world_size": run.world,
            "mp_world_size": 1,
            "ds_config": config,
            "ds_version": "0.19.8",
            **run.client_state,
        }

    @property
    def prefix(self) -> str:
        return "bf16_" if self.run.dtype == torch.bfloat16 else ""

    def options(self, index: int) -> dict[str, Any]:
        return {"lr": 0.1 * (index + 1), "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}

    def step(self) -> dict[str, Any]:
        return {} if self.run.step is None else {"step": torch.tensor(self.run.step)}


class _Stage12(_Writer):
    def order(self, group: Tensors) -> list[str]:
        names = list(group)
        if self.run.round_robin:
            names = [n for r in range(self.run.world) for n in names[r :: self.run.world]]
        return names

    def paddings(self, group: Tensors) -> list[int]:
        names = self.order(group)
        if not self.run.aligned:
            return [0] * len(names)
        return [*(-group[name].numel() % 4 for name in names[:-1]), 0][: len(names)]

    def flat(self, group: Tensors, values: Tensors) -> torch.Tensor:
        parts = []
        for name, padding in zip(self.order(group), self.paddings(group), strict=True):
            parts += [values[name].reshape(-1).float(), torch.full((padding,), -7.0)]
        return torch.cat(parts) if parts else torch.empty(0)

    def partitions(self, flat: torch.Tensor) -> list[torch.Tensor]:
        world = self.run.world
        padded = torch.cat([flat, torch.full((-flat.numel() % (2 * world),), -9.0)])
        return list(padded.view(world, -1))

    def slices(self, group: Tensors, rank: int, share: int) -> OrderedDict[str, fragment_address]:
        """As the optimizer lists them, whatever the order of the flat buffer is."""
        found, at = OrderedDict[str, fragment_address](), 0
        paddings = dict(zip(self.order(group), self.paddings(group), strict=True))
        for name, value in group.items():
            low, high = max(at, rank * share), min(at + value.numel(), (rank + 1) * share)
            if low < high:
                found[name] = fragment_address(high - low, low - rank * share)
            at += value.numel() + paddings[name]
        return found

    def files(self) -> Iterator[tuple[str, Any]]:
        run = self.run
        module = {**run.frozen, **run.masters}
        model = {name: value.to(run.dtype) for name, value in module.items()} | dict(run.buffers)
        tree = {
            "module": OrderedDict(model),
            "param_shapes": [_shapes(self.order(g), g) for g in run.groups],
            "frozen_param_shapes": _shapes(list(run.frozen), run.frozen),
            "frozen_param_fragments": {n: v.to(run.dtype) for n, v in run.frozen.items()},
            **self.common(),
        }
        yield "mp_rank_00_model_states.pt", tree
        for rank in range(run.world):
            name = f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            yield name, {"optimizer_state_dict": self.rank(rank), "ds_version": "0.19.8"}

    def rank(self, rank: int) -> dict[str, Any]:
        run = self.run
        masters, paddings, mappings = [], [], []
        state: dict[int, dict[str, Any]] = {}
        for index, group in enumerate(run.groups):
            flat = self.flat(group, group)
            own = self.partitions(flat)[rank].clone()
            beyond = min(own.numel(), max(0, (rank + 1) * own.numel() - flat.numel()))
            masters.append(own if run.keeps_padding else own[: own.numel() - beyond])
            paddings.append(beyond)
            mappings.append(self.slices(group, rank, own.numel()))
            parts = {
                k: self.partitions(self.flat(group, v))[rank].clone() for k, v in run.states.items()
            }
            state[index] = {**self.step(), **parts}
        groups = [{**self.options(i), "params": [i]} for i in range(len(run.groups))]
        found: dict[str, Any] = {
            "base_optimizer_state": {"state": state, "param_groups": groups},
            "single_partition_of_fp32_groups": masters,
            "group_paddings": paddings,
            "param_alignment_paddings": [self.paddings(group) for group in run.groups],
            "partition_count": [run.world] * len(run.groups),
            "param_slice_mappings": mappings,
        }
        if not run.keeps_padding:
            found |= {"zero_stage": ZeroStageEnum(run.stage), "loss_scaler": LossScaler()}
        return found


class _Stage3(_Writer):
    def sub_groups(self) -> list[tuple[int, list[str]]]:
        """(group, names), as many parameters each as fit into the size."""
        found: list[tuple[int, list[str]]] = []
        for index, group in enumerate(self.run.groups):
            room = 0
            for number, (name, value) in enumerate(group.items()):
                if not number or room <= 0:
                    found.append((index, []))
                    room = self.run.sub_group_size
                found[-1][1].append(name)
                room -= -(-value.numel() // self.run.world)
        return found

    def share(self, value: torch.Tensor, rank: int) -> torch.Tensor:
        flat = value.reshape(-1)
        length = -(-flat.numel() // self.run.world)
        padded = torch.cat(
            [flat, torch.full((length * self.run.world - flat.numel(),), -9.0).to(flat)]
        )
        return padded[rank * length : (rank + 1) * length].clone()

    def joined(self, names: Sequence[str], values: Tensors, rank: int) -> torch.Tensor:
        return torch.cat([self.share(values[name].float(), rank) for name in names])

    def files(self) -> Iterator[tuple[str, Any]]:
        run = self.run
        stand_ins = {n: torch.empty(0, dtype=run.dtype) for n in {**run.frozen, **run.masters}}
        for rank in range(run.world):
            fragments = {n: self.share(v.to(run.dtype), rank) for n, v in run.frozen.items()}
            tree = {
                "module": OrderedDict({**stand_ins, **run.buffers}),
                "param_shapes": [_shapes(names, run.masters) for _, names in self.sub_groups()],
                "frozen_param_shapes": _shapes(list(run.frozen), run.frozen),
                "frozen_param_fragments": fragments,
                **self.common(),
            }
            yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", tree
            name = f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            yield name, {"optimizer_state_dict": self.rank(rank), "ds_version": "0.19.8"}

    def rank(self, rank: int) -> dict[str, Any]:
        run, masters = self.run, self.run.masters
        subs = self.sub_groups()
        state = {
            i: {**self.step(), **{k: self.joined(n, v, rank) for k, v in run.states.items()}}
            for i, (_, n) in enumerate(subs)
        }
        groups = [
            {**self.options(g), "params": [i for i, (home, _) in enumerate(subs) if home == g]}
            for g in range(len(run.groups))
        ]
        return {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(),
            "partition_count": run.world,
            "optimizer_state_dict": {"state": state, "param_groups": groups},
            "fp32_flat_groups": [self.joined(names, masters, rank) for _, names in subs],
        }
