"""Tensor parallelism: which dimension each parameter was split along, and the whole. Pure but for a callback.

DeepSpeed's files hold every rank's part under the same name, and mostly not how the parts make the whole. What is
known, in this order: the patterns of `universal_checkpoint_info`, where training code or AutoTP left them; that
equal parts are replicas; that a vector can only be split along its one dimension; that a layer's bias is split as its
outputs are; and the sizes: a dimension as long as one that replicas have is whole, one as long as a split vector is
split. What stays open is refused, because a wrong guess would scramble the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.interop.deepspeed.column import Column, Value
from zero_ckpt.interop.deepspeed.tensors import LayoutError, Part, Piece, Tensor, joined

__all__ = ["SameBytes", "join_columns"]

SameBytes = Callable[[Sequence[Tensor]], bool]

_ROW = re.compile(
    r"(.*\.)?(o_proj|down_proj|out_proj|dense_4h_to_h|wo|w2|fc_out|linear_fc2|linear_proj)\.weight"
)
_COLUMN = re.compile(
    r"(.*\.)?(q_proj|k_proj|v_proj|gate_proj|up_proj|query_key_value|dense_h_to_4h|linear_qkv|linear_fc1|w1|w3|"
    r"word_embeddings|embed_tokens|lm_head)\.weight"
)
"""Names that models of many families give to layers that are split along their inputs, or their outputs."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """How parts make the whole: end to end along `dim`; None: they are replicas.

    `widths[i][rank]`: extents along `dim` of sub-parameters that were split one by one (fused query, key, value) and
    are joined one by one. `keep`: rows of the whole; what follows is padding. None: all of them.
    """

    dim: int | None
    widths: tuple[tuple[int, ...], ...] = ()
    keep: int | None = None


def join_columns(columns: Sequence[Column], info: Any, same: SameBytes) -> Column:
    """The column of a model without tensor parallelism. `columns`: by rank; `same(tensors)`: whether all are equal.

    Raises `LayoutError`.
    """
    if len(columns) == 1:
        return columns[0]
    first = columns[0]
    names = [*first.masters, *(n for n in first.module if n not in first.masters)]
    parts = {name: [_local(column, name) for column in columns] for name in names}
    rules = _Rules(parts, info, same).find()
    joint = Column(
        groups=first.groups,
        order=first.order,
        buffers=first.buffers,
        frozen=first.frozen,
        aliases=first.aliases,
        problem=next((c.problem for c in columns if c.problem), ""),
    )
    for name in names:
        target = joint.masters if name in first.masters else joint.module
        target[name] = _whole(name, parts[name], rules[name])
    for name, states in first.states.items():
        joint.states[name] = {
            key: _whole_value(
                name, key, [c.states.get(name, {}).get(key) for c in columns], rules[name]
            )
            for key in states
        }
    return joint


def _local(column: Column, name: str) -> Tensor:
    found = column.masters.get(name) or column.module.get(name)
    if found is None:
        raise LayoutError(f"parameter '{name}' is missing on a tensor-parallel rank")
    return found


def _whole(name: str, parts: Sequence[Tensor], rule: _Rule) -> Tensor:
    if rule.dim is None:
        return parts[0]
    try:
        tensor = _interleaved(parts, rule) if rule.widths else joined(parts, rule.dim)
    except LayoutError as error:
        raise LayoutError(f"parameter '{name}': {error}") from error
    if rule.keep is not None and rule.keep < tensor.shape[0]:
        tensor = _rows(tensor, 0, rule.keep)
    return tensor


def _whole_value(name: str, key: str, values: Sequence[Value | None], rule: _Rule) -> Value:
    first = values[0]
    if isinstance(first, Tensor) and first.shape:
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) == len(values):
            return _whole(f"{name}/{key}", tensors, rule)
    if first is None or any(value is None for value in values):
        raise LayoutError(f"state '{key}' of '{name}' is missing on a tensor-parallel rank")
    return first


def _interleaved(parts: Sequence[Tensor], rule: _Rule) -> Tensor:
    """Sub-parameter by sub-parameter, each joined from all ranks."""
    if rule.dim != 0:
        raise LayoutError("sub-parameters are joined along dimension 0 only")
    done = [0] * len(parts)
    rows: list[Tensor] = []
    for widths in rule.widths:
        for rank, (part, width) in enumerate(zip(parts, widths, strict=True)):
            rows.append(_rows(part, done[rank], width))
            done[rank] += width
    if done != [part.shape[0] for part in parts]:
        raise LayoutError(f"sub-parameters of {done} rows, parts of {[p.shape[0] for p in parts]}")
    return joined(rows, 0)


def _rows(tensor: Tensor, start: int, count: int) -> Tensor:
    """Rows of a tensor whose parts are split along rows only."""
    row = prod(tensor.shape[1:])
    found = []
    for part in tensor.parts:
        if part.shape[1:] != tensor.shape[1:]:
            raise LayoutError("rows of a tensor that is split along another dimension")
        low, high = max(start, part.offset[0]), min(start + count, part.offset[0] + part.shape[0])
        if low < high:
            begin, end = (low - part.offset[0]) * row, (high - part.offset[0]) * row
            pieces = tuple(_cut(p, begin, end, tensor.dtype) for p in part.pieces)
            kept = tuple(p for p in pieces if p is not None)
            offset = (low - start, *part.offset[1:])
            found.append(Part(offset, (high - low, *tensor.shape[1:]), kept))
    return Tensor(tensor.dtype, (count, *tensor.shape[1:]), tuple(found))


def _cut(piece: Piece, begin: int, end: int, dtype: str) -> Piece | None:
    low, high = max(piece.start, begin), min(piece.start + piece.count, end)
    if low >= high:
        return None
    address = piece.begin + (low - piece.start) * itemsize(dtype)
    return Piece(piece.file, address, low - begin, high - low)


@dataclass(slots=True)
class _Rules:
    """Finds the rule of every parameter, from the surest evidence on."""

    parts: Mapping[str, Sequence[Tensor]]
    info: Any
    same: SameBytes
    found: dict[str, _Rule] = field(default_factory=dict)

    def find(self) -> dict[str, _Rule]:
        if isinstance(self.info, dict) and self.info:
            self._from_info(self.info)
        open_names = [name for name in self.parts if name not in self.found]
        for name in open_names:
            self._from_values(name)
        while self._from_neighbours():
            pass
        for name, parts in self.parts.items():
            if name not in self.found:
                self._from_names(name, parts)
        return self.found

    def _from_info(self, info: Mapping[str, Any]) -> None:
        for name, parts in self.parts.items():
            rule = _told(info, name, parts)
            if rule is not None:
                self.found[name] = rule

    def _from_values(self, name: str) -> None:
        parts = self.parts[name]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            dims = [d for d in range(len(parts[0].shape)) if len({s[d] for s in shapes}) > 1]
            if len(dims) == 1:
                self.found[name] = _Rule(dims[0])
        elif not parts[0].numel or self.same(parts):
            self.found[name] = _Rule(None)
        elif len(parts[0].shape) <= 1:
            if not parts[0].shape:
                raise LayoutError(f"scalar '{name}' differs between tensor-parallel ranks")
            self.found[name] = _Rule(0)

    def _from_neighbours(self) -> bool:
        """One more round of conclusions from biases and sizes. Returns whether there was a new one."""
        whole, split = self._sizes()
        progress = False
        for name, parts in self.parts.items():
            if name in self.found:
                continue
            shape = parts[0].shape
            bias = self.found.get(f"{name.removesuffix('weight')}bias")
            dims = [
                d
                for d, size in enumerate(shape)
                if size in split
                and size not in whole
                and all(n in whole for i, n in enumerate(shape) if i != d)
            ]
            if name.endswith("weight") and bias is not None and bias.dim == 0:
                dims = [0]
            if len(dims) == 1:
                self.found[name], progress = _Rule(dims[0]), True
        return progress

    def _sizes(self) -> tuple[set[int], set[int]]:
        """(lengths of dimensions that are whole, lengths of parts of split ones)."""
        whole, split = set[int](), set[int]()
        for name, rule in self.found.items():
            shape = self.parts[name][0].shape
            for d, size in enumerate(shape):
                (split if d == rule.dim else whole).add(size)
        return whole, split

    def _from_names(self, name: str, parts: Sequence[Tensor]) -> None:
        if len(parts[0].shape) == 2 and (_ROW.fullmatch(name) or _COLUMN.fullmatch(name)):
            self.found[name] = _Rule(1 if _ROW.fullmatch(name) else 0)
            return
        raise LayoutError(
            f"parameter '{name}' of shape {list(parts[0].shape)} differs between {len(parts)} tensor-parallel ranks, "
            "and the files do not say along which dimension it was split. Save 'universal_checkpoint_info' with the "
            "checkpoint"
        )


def _told(info: Mapping[str, Any], name: str, parts: Sequence[Tensor]) -> _Rule | None:
    """The rule that the patterns of `universal_checkpoint_info` give."""
    if _matches(info, "tp_replicated_parameter_patterns", name):
        return _Rule(None)
    if _matches(info, "parameter_to_average_patterns", name):
        return None  # right when the parts are equal, which is looked at next
    if _matches(info, "parameter_with_2_sub_params_cat_dim_0", name):
        half = tuple(part.shape[0] // 2 for part in parts)
        return _Rule(0, (half, half))
    for entry in info.get("parameter_with_sub_params") or []:
        patterns = entry.get("patterns") if isinstance(entry, dict) else None
        for pattern in patterns or []:
            if _match(pattern, name):
                return _sub_params(info, entry, pattern, parts)
    keep = info.get("original_vocab_size")
    is_vocabulary = _matches(info, "vocabulary_parameter_patterns", name)
    if _matches(info, "parameter_with_row_parallelism_patterns", name):
        return _Rule(1 if len(parts[0].shape) > 1 else 0)
    if is_vocabulary and type(keep) is int:
        return _Rule(0, keep=keep)
    return _Rule(0) if info.get("tp_replicated_parameter_patterns") else None


def _sub_params(
    info: Mapping[str, Any], entry: Mapping[str, Any], pattern: str, parts: Sequence[Tensor]
) -> _Rule:
    dim, shape = entry.get("partition_dim"), entry.get("shape")
    sizes = shape[dim] if isinstance(shape, (tuple, list)) and type(dim) is int else None
    total = sum(part.shape[0] for part in parts)
    if isinstance(sizes, int) and sizes > 0:
        sizes = (total // sizes,) * sizes
    if dim != 0 or not isinstance(sizes, (tuple, list)) or sum(sizes) != total:
        raise LayoutError(f"sub-parameters of pattern {pattern!r} are laid out in an unknown way")
    recorded = (info.get("sub_param_shard_widths") or {}).get(pattern)
    if recorded is not None:
        return _Rule(0, tuple(tuple(widths) for widths in recorded))
    if any(size % len(parts) for size in sizes):
        raise LayoutError(f"sub-parameters of pattern {pattern!r} do not divide evenly")
    return _Rule(0, tuple((size // len(parts),) * len(parts) for size in sizes))


def _matches(info: Mapping[str, Any], key: str, name: str) -> bool:
    return any(_match(pattern, name) for pattern in info.get(key) or [])


def _match(pattern: Any, name: str) -> bool:
    try:
        return isinstance(pattern, str) and re.match(pattern, name) is not None
    except re.error:
        return False
