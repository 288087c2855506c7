"""One tag's folder put together: the whole model that its files hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.storage import Storage as Files
from zero_ckpt.core.tag_folder import ANOTHER_TAG
from zero_ckpt.errors import CorruptCheckpointError, StateMismatchError
from zero_ckpt.interop.deepspeed.column import Column, stored_items
from zero_ckpt.interop.deepspeed.file_table import FileTable
from zero_ckpt.interop.deepspeed.grid import stack_stages
from zero_ckpt.interop.deepspeed.modules import add_module, parameters_of, strip_compiled
from zero_ckpt.interop.deepspeed.moe import read_experts
from zero_ckpt.interop.deepspeed.names import read_names
from zero_ckpt.interop.deepspeed.parallel import join_columns
from zero_ckpt.interop.deepspeed.pipeline import drop_doubles, drop_tied, stage_names
from zero_ckpt.interop.deepspeed.save import Save, Tree
from zero_ckpt.interop.deepspeed.sources import read_bytes
from zero_ckpt.interop.deepspeed.tensors import LayoutError, StoredTensor, Tensor
from zero_ckpt.interop.deepspeed.universal import read_universal
from zero_ckpt.interop.deepspeed.unsharded import flat_shapes, read_unsharded
from zero_ckpt.interop.deepspeed.zero3 import read_frozen, read_pieces
from zero_ckpt.interop.deepspeed.zero12 import read_partitions

__all__ = ["Opened", "open_folder"]

Names = Mapping[str, tuple[int, ...]]


@dataclass(slots=True)
class Opened:
    """A tag's folder, read. `model`: the tree of rank 0's model file. `whole`: every parameter, buffer and state."""

    table: FileTable
    save: Save
    whole: Column

    @property
    def model(self) -> Tree:
        return self.save.model


def open_folder(files: Files, folder: str) -> Opened:
    """Read the tag in `folder`, but no tensor.

    Raises `CorruptCheckpointError` naming the file or tensor, `StateMismatchError` for an unknown split.
    """
    entries = files.list(folder)
    names = read_names(
        [e.name for e in entries if not e.is_dir], [e.name for e in entries if e.is_dir]
    )
    table = FileTable(files, folder)
    try:
        save = Save(table, names)
        return Opened(table, save, _Assembly(save).whole())
    except LayoutError as error:
        raise CorruptCheckpointError(f"{folder}: {error}. {ANOTHER_TAG}") from error


class _Assembly:
    def __init__(self, save: Save) -> None:
        self._save, self._table, self._names = save, save.table, save.names

    def whole(self) -> Column:
        found = self._universal() if self._names.is_universal else self._columns()
        if self._names.layers:
            drop_tied(found)
        strip_compiled(found)
        return found

    def _columns(self) -> Column:
        stages = []
        candidates = [self._stage_candidates(tp) for tp in range(self._save.tp)]
        for pp in range(self._save.pp):
            columns = [self._column(pp, tp, candidates[tp][pp]) for tp in range(self._save.tp)]
            stages.append(self._joined(columns, self._save.model_of(pp, 0)))
        return stack_stages(stages)

    def _joined(self, columns: Sequence[Column], model: Tree) -> Column:
        info = model.get("universal_checkpoint_info")
        try:
            return join_columns(columns, info, self._same)
        except LayoutError as error:
            raise StateMismatchError(f"{self._save.folder}: {error}.") from error

    def _same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors hold equal bytes, looked at piece by piece until they differ."""
        first = tensors[0]
        for other in tensors[1:]:
            for low, high in _windows(first):
                if self._window(first, low, high) != self._window(other, low, high):
                    return False
        return True

    def _window(self, tensor: Tensor, low: int, high: int) -> bytes:
        """Bytes of elements `low .. high` of a tensor of one part."""
        size, found = itemsize(tensor.dtype), bytearray()
        for piece in tensor.pieces:
            start, stop = max(low, piece.start), min(high, piece.start + piece.count)
            if start < stop:
                source = self._table.sources[piece.file]
                begin = piece.begin + (start - piece.start) * size
                found += read_bytes(source, begin, (stop - start) * size)
        return bytes(found)

    def _column(self, pp: int, tp: int, candidates: Names | None) -> Column:
        save, model = self._save, self._save.model_of(pp, tp)
        module = self._module(pp, tp, model)
        if save.sharded:
            column = read_pieces(model, save.optims(pp, tp))
            column.module |= read_frozen(self._models_of_ranks(pp, tp))
        elif save.has_optims(pp, tp):
            column = read_partitions(model, save.optims(pp, tp))
        elif self._names.expert_optims:
            column = read_experts(self._table, self._names, save.column(pp, tp), module)
        else:
            known = parameters_of(model, module) if candidates is None else candidates
            column = read_unsharded(model.get("optimizer"), known)
            drop_doubles(column)
        add_module(column, model, module, sharded=save.sharded)
        return column

    def _models_of_ranks(self, pp: int, tp: int) -> list[Tree]:
        """The model files of all data-parallel ranks, where they hold pieces of frozen parameters."""
        first = self._save.model_of(pp, tp)
        ranks = range(1, self._save.dp) if first.get("frozen_param_fragments") else ()
        return [first, *(self._save.model_of(pp, tp, dp) for dp in ranks)]

    def _module(self, pp: int, tp: int, model: Tree) -> dict[str, StoredTensor]:
        """Tensors of the module's state dict, those of layer and expert files included."""
        found = dict(stored_items(model.get("module")))
        if pp == 0:
            for (layer, rank), name in sorted(self._names.layers.items()):
                if rank == tp:
                    items = stored_items(self._save.tree(name))
                    found |= {f"{layer}.{key}": stored for key, stored in items}
        mp = self._save.column(pp, tp)
        for (_, _, rank), name in sorted(self._names.experts.items()):
            if rank == mp:
                tree = self._save.tree(name)
                inner = tree.get("module")
                found |= dict(stored_items(inner if isinstance(inner, dict) else tree))
        return found

    def _stage_candidates(self, tp: int) -> Sequence[Names | None]:
        """For each pipeline stage the parameters of its optimizer, where the optimizer does not name them."""
        save = self._save
        if save.pp == 1 or save.has_optims(0, tp):
            return [None] * save.pp
        shapes = [flat_shapes(save.model_of(pp, tp).get("optimizer")) for pp in range(save.pp)]
        module = {name: stored.shape for name, stored in self._module(0, tp, {}).items()}
        return stage_names(shapes, module) or [{}] * save.pp

    def _universal(self) -> Column:
        save = self._save
        ranks = [(pp, tp) for pp in range(save.pp) for tp in range(save.tp)]
        column = read_universal(self._table, [save.model_of(pp, tp) for pp, tp in ranks])
        for pp, tp in ranks:
            part = Column(masters=column.masters)
            if save.sharded:
                part.module = read_frozen(self._models_of_ranks(pp, tp))
            model = save.model_of(pp, tp)
            add_module(part, model, self._module(pp, tp, model), sharded=save.sharded)
            column = stack_stages([column, part])
        return column


def _windows(tensor: Tensor) -> list[tuple[int, int]]:
    """Ranges of elements to compare: a short one first, which shows most differences, then longer ones."""
    numel, found, at, step = tensor.numel, list[tuple[int, int]](), 0, 1 << 10
    while at < numel:
        found.append((at, min(at + step, numel)))
        at, step = at + step, 1 << 20
    return found
