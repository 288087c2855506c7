"""Which files of a tag's folder belong to the save that is meant, and their trees.

Files of an earlier save may lie in the same folder, of more ranks or of another stage. The newest model file says how
many ranks and which stage the save had; files that these do not account for are not opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from zero_ckpt.core.tag_folder import ANOTHER_TAG
from zero_ckpt.errors import CorruptCheckpointError
from zero_ckpt.interop.deepspeed.column import zero_options
from zero_ckpt.interop.deepspeed.file_table import FileTable
from zero_ckpt.interop.deepspeed.names import Folder
from zero_ckpt.interop.deepspeed.tensors import LayoutError

__all__ = ["Save", "Tree"]

Tree = Mapping[str, Any]


class Save:
    """The files of one save.

    `sharded`: whether it is of stage 3, where every rank has a model file of its own. `model`: the tree of rank 0's.
    `dp`, `pp`, `tp`: numbers of data-parallel ranks, pipeline stages and tensor-parallel ranks.

    Raises `CorruptCheckpointError` for a file that is missing or no mapping, `LayoutError` for numbers that are none.
    """

    def __init__(self, table: FileTable, names: Folder) -> None:
        self.table, self.names, self.folder = table, names, table.folder
        self.sharded = self._choose_stage()
        self.model = self.tree(self._model_name(0, 0))
        self.dp = self._count("dp_world_size", self._found_ranks())
        self._mp = self._count("mp_world_size", max(1, len(self._found_columns())))
        self.pp, self.tp = self._degrees()
        self._prefix = self._optim_prefix()

    @property
    def world_size(self) -> int:
        return self.dp * self._mp

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        if self.sharded:
            return 3
        found = zero_options(self.model).get("stage", 0)
        return found if type(found) is int and 0 <= found <= 3 else 0

    @property
    def created(self) -> float:
        """When the newest file was written, in seconds since the epoch; 0 where the storage is no file system."""
        found = 0.0
        for name in (self._model_name(0, 0), *self.names.optims.get(self._prefix, {}).values()):
            with suppress(OSError):
                found = max(found, os.stat(f"{self.folder}/{name}").st_mtime)
        return found

    def tree(self, name: str) -> Tree:
        """What a file holds, by its name."""
        tree = self.table.open(name).tree
        if not isinstance(tree, dict):
            raise CorruptCheckpointError(
                f"{self.folder}/{name}: a mapping expected, {type(tree).__name__} found. {ANOTHER_TAG}"
            )
        return tree

    def model_of(self, pp: int, tp: int, dp: int = 0) -> Tree:
        return self.tree(self._model_name(dp, self.column(pp, tp)))

    def column(self, pp: int, tp: int) -> int:
        """The model-parallel rank."""
        return pp * self.tp + tp

    def has_optims(self, pp: int, tp: int) -> bool:
        """Whether the save partitioned the optimizer; partitions without `param_shapes` are an earlier save's."""
        mp = self.column(pp, tp)
        if self.model_of(pp, tp).get("param_shapes") is None:
            return False
        return any(key[1] == mp for key in self.names.optims.get(self._prefix, ()))

    def optims(self, pp: int, tp: int) -> list[Tree]:
        """`optimizer_state_dict` of every data-parallel rank."""
        found: list[Tree] = []
        mp = self.column(pp, tp)
        for dp in range(self.dp):
            name = self.names.optims.get(self._prefix, {}).get((dp, mp))
            if name is None:
                raise CorruptCheckpointError(
                    f"{self.folder}: the optimizer file of rank {dp}, model-parallel rank {mp} is missing; the save "
                    f"had {self.dp} data-parallel ranks. {ANOTHER_TAG}"
                )
            state = self.tree(name).get("optimizer_state_dict")
            if not isinstance(state, dict):
                raise CorruptCheckpointError(
                    f"{self.folder}/{name}: 'optimizer_state_dict' expected. {ANOTHER_TAG}"
                )
            found.append(state)
            self.table.forget(name)
        return found

    def _choose_stage(self) -> bool:
        """Whether this is a save of stage 3, whose model files are every rank's own."""
        names = self.names
        if names.is_universal and names.models:
            return False  # with names for stage 3 beside, it is one save for either
        if not names.models or not names.zero_models:
            if not names.models and not names.zero_models:
                raise CorruptCheckpointError(
                    f"{self.folder}: no '*_model_states.pt' there, which says what the other files hold. {ANOTHER_TAG}"
                )
            return bool(names.zero_models)
        steps = []
        for name in (names.models[min(names.models)], names.zero_models[min(names.zero_models)]):
            step = self.tree(name).get("global_steps")
            steps.append(step if isinstance(step, int) else -1)
        if steps[0] == steps[1]:
            raise CorruptCheckpointError(
                f"{self.folder}: files of two saves with different ZeRO stages, both of step {steps[0]}: it is not "
                "known which is meant. Move the files of one save elsewhere."
            )
        return steps[1] > steps[0]

    def _model_name(self, dp: int, mp: int) -> str:
        name = self.names.zero_models.get((dp, mp)) if self.sharded else self.names.models.get(mp)
        if name is None:
            where = (
                f"rank {dp}, model-parallel rank {mp}"
                if self.sharded
                else f"model-parallel rank {mp}"
            )
            raise CorruptCheckpointError(
                f"{self.folder}: the model file of {where} is missing. {ANOTHER_TAG}"
            )
        return name

    def _count(self, key: str, found: int) -> int:
        value = self.model.get(key, found)
        if type(value) is not int or not 1 <= value <= 1 << 20:
            raise LayoutError(f"'{key}' of the model file is {value!r}")
        return value

    def _found_columns(self) -> set[int]:
        names = self.names
        return {mp for _, mp in names.zero_models} if self.sharded else set(names.models)

    def _found_ranks(self) -> int:
        """The number of data-parallel ranks by the files there are, for old versions, which do not record it."""
        optims = [rank for found in self.names.optims.values() for rank, _ in found]
        models = [rank for rank, _ in self.names.zero_models] if self.sharded else []
        return max([*optims, *models, 0]) + 1

    def _degrees(self) -> tuple[int, int]:
        """(pipeline stages, tensor-parallel ranks)."""
        found = self.model.get("checkpoint_parallel_dimensions")
        pp = found.get("pp_degree") if isinstance(found, dict) else None
        if type(pp) is not int or pp < 1:
            tp = max((tp for _, tp in self.names.layers), default=self._mp - 1) + 1
            pp = self._mp // tp if self.names.layers else 1
        if self._mp % pp:
            raise LayoutError(f"{self._mp} model-parallel ranks in {pp} pipeline stages")
        return pp, self._mp // pp

    def _optim_prefix(self) -> str:
        """Which of two sets of optimizer files is meant: that of the precision in the model file's configuration."""
        optims = self.names.optims
        if len(optims) <= 1:
            return next(iter(optims), "")
        config = self.model.get("ds_config")
        bf16 = config.get("bf16", config.get("bfloat16")) if isinstance(config, dict) else None
        wanted = "bf16_" if isinstance(bf16, dict) and bf16.get("enabled") else ""
        return wanted if wanted in optims else next(iter(optims))
