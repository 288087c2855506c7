"""What an export writes: which files, and what is in each. Everything but the tensors' values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.places import is_url
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32.layout import (
    FileLayout,
    in_shards,
    layout_safetensors,
    parse_size,
)
from zero_ckpt.fp32.publishing import Output
from zero_ckpt.fp32.selection import OutTensor, select
from zero_ckpt.fp32.state_dict import extra_state
from zero_ckpt.fp32.torch_file import layout_torch_file, stand_ins

__all__ = ["Contents", "Options"]

_OF_TRAINING = frozenset(
    {
        "callbacks",
        "optimizer_states",
        "lr_schedulers",
        "averaging_state",
        "current_model_state",
    }
)
"""Entries of Lightning's checkpoints that only a resumed training reads, and that are as large as the model."""


@dataclass(frozen=True, slots=True)
class Options:
    """See `export_fp32`."""

    output: Output
    max_shard_size: int | str | None
    exclude_frozen_parameters: bool
    strip_prefix: str | None
    dtype: str
    weights_only: bool

    def as_record(self) -> dict[str, Any]:
        """For ranks to compare."""
        return asdict(self)


class Contents:
    """The files of one export. Layouts are made when asked for, and are the same on every rank."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self.checkpoint, self._options = checkpoint, options
        self._format = options.output.format
        chosen = select(
            checkpoint.manifest,
            dtype=options.dtype,
            exclude_frozen_parameters=options.exclude_frozen_parameters,
            strip_prefix=options.strip_prefix,
        )
        self._groups = self._group(chosen)
        self._layouts: dict[int, FileLayout] = {}
        self.names = options.output.names(len(self._groups))

    @property
    def has_checksums(self) -> bool:
        """Whether a file holds sums of all its bytes, as an archive does."""
        return self._format != "safetensors"

    @property
    def has_one_writer(self) -> bool:
        """Whether a file must come from one lane, as an object does."""
        return is_url(self._options.output.folder)

    @property
    def num_sources(self) -> int:
        """How many shard files the model's tensors lie in."""
        placed = {id(p): p for p in self.checkpoint.manifest.tensors["model"].values()}
        return len({rank for p in placed.values() for run in p.runs for rank in run.ranks()})

    @property
    def index(self) -> dict[str, object] | None:
        """The Hugging Face index of several files; None for a single file."""
        if len(self.names) == 1:
            return None
        tensors = [tensor for group in self._groups for tensor in group]
        copies = self._format == "safetensors"
        total = sum(t.nbytes * (len(t.names) if copies else 1) for t in tensors)
        weight_map = {
            name: file
            for file, group in zip(self.names, self._groups, strict=True)
            for tensor in group
            for name in tensor.names
        }
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def layout(self, file: int) -> FileLayout:
        """The layout of file number `file`.

        Raises `ConfigurationError` for what the format cannot hold, `UnsafeObjectError` for pickled objects.
        """
        if file not in self._layouts:
            self._layouts[file] = self._make_layout(file)
        return self._layouts[file]

    def notices(self) -> list[str]:
        """What the user should know about state that is left out of the files."""
        if self._format != "safetensors":
            return []
        extra = extra_state(self.checkpoint, self._options.weights_only)
        if not extra:
            return []
        text = f"safetensors cannot hold the modules' extra state, which is left out: {list(extra)[:3]}. "
        return [text + "Load with strict=False, or export with format='bin'."]

    def _group(self, chosen: list[OutTensor]) -> list[list[OutTensor]]:
        limit = self._options.max_shard_size
        if limit is None:
            return [chosen]
        if self._format == "ckpt":
            raise ConfigurationError(
                "Lightning loads a .ckpt as one file: leave out max_shard_size, or use another format"
            )
        shards = in_shards(chosen, parse_size(limit), copies=self._format == "safetensors")
        return shards or [[]]

    def _make_layout(self, file: int) -> FileLayout:
        tensors = self._groups[file]
        if self._format == "safetensors":
            return layout_safetensors(tensors)
        state_dict = stand_ins(tensors)
        if file == 0:
            state_dict |= extra_state(self.checkpoint, self._options.weights_only)
        tree = state_dict if self._format == "bin" else self._lightning(state_dict)
        return layout_torch_file(tree, self.checkpoint.placed)

    def _lightning(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint as Lightning saves it with `save_weights_only=True`."""
        client = self.checkpoint.objects(self._options.weights_only).get("client_state")
        if not isinstance(client, dict) or "pytorch-lightning_version" not in client:
            raise ConfigurationError(
                f"{self.checkpoint.path}: not written by Lightning, so there is nothing to make a Lightning "
                ".ckpt from; use format='bin' or format='safetensors'"
            )
        kept = {key: value for key, value in client.items() if key not in _OF_TRAINING}
        return {**kept, "state_dict": state_dict}
