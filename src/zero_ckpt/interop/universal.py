"""Writes a checkpoint of any format as a universal one of DeepSpeed's, which that loads at any number of ranks.

    <directory>/<tag>_universal/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt     whole tensors
    <directory>/<tag>_universal/zero/optimizer_state.pt                                  groups and their options
    <directory>/<tag>_universal/mp_rank_00_model_states.pt                               buffers, frozen, client state
    <directory>/<tag>_universal/zero_pp_rank_0_mp_rank_00_model_states.pt                the same, as stage 3 calls it
    <directory>/latest_universal                                                         the tag, written last

The layout is that of DeepSpeed 0.19's `ds_to_universal` after ZeRO stage 1 and 2, and has what DeepSpeed's loader at
stage 3 wants as well; its own converter writes for the one or for the other. Tensors are streamed, one file after the
other, and the tag's folder appears when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from zero_ckpt.core.binding import prefix_of
from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.checkpoint import Checkpoint, open_checkpoint
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.places import local
from zero_ckpt.core.state import by_parameter
from zero_ckpt.core.state_values import split_state_name
from zero_ckpt.errors import ConfigurationError, StateMismatchError
from zero_ckpt.fp32.assembly import Assembler, BlockCache
from zero_ckpt.fp32.checksums import Checksums
from zero_ckpt.fp32.torch_file import layout_torch_file
from zero_ckpt.fp32.writing import write_range

__all__ = ["convert_to_universal"]

MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Names of the model file: of stage 0 to 2, and of stage 3."""

_VERSION = "0.19.8"
"""The version of DeepSpeed whose layout this is."""


def convert_to_universal(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    tag: str | int | None = None,
    *,
    name: str | None = None,
    weights_only: bool = True,
) -> str:
    """Write `source` as `<name>_universal` into `directory`; returns that folder. Arguments as `convert_checkpoint`'s.

    Raises `ConfigurationError` when that folder exists, `StateMismatchError` for parameters or optimizer state that
    DeepSpeed's layout has no place for, and what opening the source raises.
    """
    with open_checkpoint(source, None if tag is None else str(tag)) as checkpoint:
        target = (
            f"{(name or os.path.basename(checkpoint.tag)).removesuffix('_universal')}_universal"
        )
        root = local(directory, "DeepSpeed's universal layout")
        folder, partial = f"{root}/{target}", f"{root}/.{target}.partial"
        if os.path.lexists(folder):
            raise ConfigurationError(f"{folder}: exists already; remove it, or give another name")
        shutil.rmtree(partial, ignore_errors=True)
        storage = LocalStorage()
        try:
            _Writer(checkpoint, partial, weights_only).write()
            for inner, _, _ in os.walk(partial, topdown=False):
                storage.sync(inner)  # the files are durable, and now their names
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        storage.sync(root)
        storage.put(f"{root}/latest_universal", target.encode())
        return folder


class _Writer:
    def __init__(self, checkpoint: Checkpoint, folder: str, weights_only: bool) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._objects = checkpoint.objects(weights_only)
        self._storage, self._pool, self._cache = LocalStorage(), StagingPool(), BlockCache(16)

    def write(self) -> None:
        groups = self._groups()
        names = [name for group in groups for name in group["params"]]
        found = by_parameter(self._checkpoint.keys("optim"), self._prefix(), set(names))
        for name in names:
            self._parameter(name, found.get(name, {}))
        self._file("zero/optimizer_state.pt", self._optimizer(groups, found))
        model = self._model([g["params"] for g in groups])
        for file in MODEL_FILES:
            self._file(file, model)

    def _groups(self) -> list[dict[str, Any]]:
        records = self._objects.get("optimizers", {})
        if len(records) != 1:
            raise StateMismatchError(
                f"{self._checkpoint.path}: one optimizer expected, {len(records)} found: DeepSpeed has one"
            )
        groups: list[dict[str, Any]] = next(iter(records.values()))["groups"]
        return groups

    def _prefix(self) -> str:
        return prefix_of(next(iter(self._objects["optimizers"])))

    def _parameter(self, name: str, states: Mapping[str, str]) -> None:
        checkpoint = self._checkpoint
        key = checkpoint.resolve(name)
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise StateMismatchError(f"{checkpoint.path}: '{name}' cannot be the name of a folder")
        if key is None:
            raise StateMismatchError(
                f"{checkpoint.path}: no weights of '{name}', which was stepped"
            )
        master = checkpoint.lazy("model", key)
        self._file(f"zero/{name}/fp32.pt", {"cat_dim": 0, "param": master})
        for state, stored in states.items():
            if split_state_name(state)[1]:
                raise StateMismatchError(
                    f"{checkpoint.path}: state '{state}' of '{name}' is no tensor; the universal layout has tensors "
                    "only"
                )
            value = checkpoint.lazy("optim", stored)
            tree = {"cat_dim": 0, "param": value} if value.shape else value
            self._file(f"zero/{name}/{state}.pt", tree)

    def _optimizer(
        self, groups: list[dict[str, Any]], states: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Any]:
        """What `zero/optimizer_state.pt` holds.

        At stage 3 DeepSpeed takes groups and step from `optimizer_state_dict`, and one step for all parameters.
        """
        options = [{**g["options"], "params": [i]} for i, g in enumerate(groups)]
        steps = [stored["step"] for stored in states.values() if "step" in stored]
        first = {"step": self._checkpoint.lazy("optim", steps[0])} if steps else {}
        return {
            "param_groups": options,
            "optimizer_state_dict": {"state": {0: first}, "param_groups": options},
            "ds_version": _VERSION,
            "dynamic_loss_scale": False,
            "overflow": False,
        }

    def _model(self, groups: list[list[str]]) -> dict[str, Any]:
        checkpoint, manifest = self._checkpoint, self._checkpoint.manifest
        stepped = {name for group in groups for name in group}
        aliases = manifest.aliases
        kept = [k for k in checkpoint.keys("model") if k not in stepped or k in aliases.values()]
        module = OrderedDict((key, checkpoint.lazy("model", key)) for key in kept)
        module |= {alias: module[key] for alias, key in aliases.items()}  # one tensor, many names
        shapes = [
            OrderedDict(
                (name, torch.Size(checkpoint.placed("model", name).shape)) for name in group
            )
            for group in groups
        ]
        frozen = {key: torch.Size(checkpoint.placed("model", key).shape) for key in manifest.frozen}
        client = self._objects.get("client_state")
        schedulers = self._objects.get("lr_schedulers", {})
        return {
            **(client if isinstance(client, dict) else {}),
            "module": module,
            "buffer_names": list(manifest.buffers),
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": frozen,
            "frozen_param_fragments": None,
            "shared_params": dict(aliases),
            "lr_scheduler": next(iter(schedulers.values()), None),
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": manifest.step,
            "global_samples": 0,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": {"zero_optimization": {"stage": manifest.zero_stage}},
            "ds_version": _VERSION,
        }

    def _file(self, name: str, tree: Any) -> None:
        layout = layout_torch_file(tree, self._checkpoint.placed)
        writer = self._storage.create(f"{self._folder}/{name}", layout.nbytes)
        try:
            assembler = Assembler(self._checkpoint.shards, self._cache, layout)
            sums = Checksums(layout)
            write_range(writer, assembler, sums, 0, layout.nbytes, self._pool, lambda _: True)
            writer.finish(layout.nbytes)
        except BaseException:
            writer.abort()
            raise
