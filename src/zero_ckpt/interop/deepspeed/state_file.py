"""The objects of a DeepSpeed checkpoint, as the core's state file has them: a tree, and the tensors in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.objects import OBJECTS, RANK_OBJECTS
from zero_ckpt.core.shard_file import Chunk
from zero_ckpt.errors import CorruptShardError
from zero_ckpt.interop.deepspeed.column import Column, extra_states
from zero_ckpt.interop.deepspeed.file_table import FileTable
from zero_ckpt.interop.deepspeed.folder import Opened
from zero_ckpt.interop.deepspeed.objects import ObjectEncoder
from zero_ckpt.interop.deepspeed.optimizers import class_of, options_of
from zero_ckpt.interop.deepspeed.sources import Bytes, Gathered, Source, WholeBlocks, read_bytes

__all__ = ["StateFile"]

_OWN_KEYS = frozenset(
    {
        "buffer_names",
        "checkpoint_parallel_dimensions",
        "csr_tensor_module_names",
        "data_sampler",
        "dp_world_size",
        "ds_autoep_layers",
        "ds_config",
        "ds_version",
        "folding",
        "frozen_param_fragments",
        "frozen_param_shapes",
        "global_samples",
        "global_steps",
        "lr_scheduler",
        "module",
        "mp_world_size",
        "num_experts",
        "optimizer",
        "param_shapes",
        "random_ltd",
        "shared_params",
        "skipped_steps",
        "sparse_tensor_module_names",
        "universal_checkpoint_info",
    }
)
"""What DeepSpeed itself puts into a model file. All other keys are the user's client state."""


class StateFile(WholeBlocks):
    """The objects, as the core's state file has them: a tree, and the tensors in it."""

    def __init__(self, opened: Opened) -> None:
        self.name = f"{opened.table.folder} (objects)"
        encoder = ObjectEncoder(OBJECTS)
        objects = _objects(opened.model, opened.whole)
        if not objects["lr_schedulers"]:
            objects["lr_schedulers"] = _schedulers_beside(opened.table)
        self._tree = json.dumps(encoder.encode(objects)).encode()
        self._source: Gathered = Gathered(self.name)
        self.chunks: list[Chunk] = []
        for key, stored in encoder.tensors.items():
            source = opened.table.sources[stored.storage.file]
            nbytes = stored.numel * itemsize(stored.dtype)
            begin = self._source.add(nbytes, _reading(source, stored.begin))
            self._add(key, stored.dtype, stored.shape, begin, nbytes)
        for key, data in encoder.pickles.items():
            store = Bytes(key)
            begin = self._source.add(len(data), _reading(store, store.add(data)))
            self._add(key, "U8", (len(data),), begin, len(data))

    def _add(self, key: str, dtype: str, shape: tuple[int, ...], begin: int, nbytes: int) -> None:
        box = full_box(shape)
        self.chunks.append(Chunk(key, key, dtype, shape, box, begin, begin + nbytes))

    def find(self, key: str, box: Box) -> Chunk:
        found = next((c for c in self.chunks if c.key == key and c.box == box), None)
        if found is None:
            raise CorruptShardError(f"{self.name}: no entry '{key}' of shape {list(box.shape)}")
        return found

    def read_entry(self, key: str) -> bytes:
        if key == f"{OBJECTS}.json":
            return self._tree
        if key == f"{RANK_OBJECTS}.json":
            return b"{}"  # DeepSpeed keeps nothing of the kind
        chunk = next((c for c in self.chunks if c.key == key), None)
        if chunk is None:
            raise CorruptShardError(f"{self.name}: no entry '{key}', which its objects name")
        return read_bytes(self._source, chunk.begin, chunk.end - chunk.begin)

    def close(self) -> None:
        """Its sources are closed by their table."""


def _schedulers_beside(table: FileTable) -> dict[str, Any]:
    """Accelerate keeps schedulers itself: in `scheduler.bin`, `scheduler_1.bin`, ... beside its tag `pytorch_model`."""
    folder, tag = os.path.split(table.folder)
    if tag != "pytorch_model":
        return {}
    there = {entry.name for entry in table.files.list(folder)}
    names = ["scheduler.bin"]
    while f"scheduler_{len(names)}.bin" in there:
        names.append(f"scheduler_{len(names)}.bin")
    if names[0] not in there:
        return {}
    trees = [table.open(f"../{name}").tree for name in names]
    return {"": trees[0]} if len(trees) == 1 else {str(i): tree for i, tree in enumerate(trees)}


def _reading(source: Source, begin: int) -> Callable[[int, int], bytes]:
    return lambda offset, nbytes: read_bytes(source, begin + offset, nbytes)


def _objects(model: Mapping[str, Any], whole: Column) -> dict[str, Any]:
    """The tree that a `Checkpointer` stores, from what DeepSpeed stored."""
    groups = [{"params": g.names, "options": options_of(g.options, whole)} for g in whole.groups]
    record = {"class": class_of(whole, model.get("ds_config")), "groups": groups}
    scheduler = model.get("lr_scheduler")
    return {
        "client_state": {key: value for key, value in model.items() if key not in _OWN_KEYS},
        "global_step": model.get("global_steps"),
        "optimizers": {"": record} if groups or whole.problem else {},
        "lr_schedulers": {} if scheduler is None else {"": scheduler},
        "extra_state": extra_states(model.get("module")),
    }
