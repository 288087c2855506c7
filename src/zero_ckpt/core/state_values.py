"""Python values in an optimizer's state <-> the small tensors that stand for them. `state` describes their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from zero_ckpt.core.objects import encode_objects

__all__ = ["MARKS", "add_value", "pickled_values", "python_value", "split_state_name"]

_PYTHON_KINDS = frozenset({"int", "float", "bool", "none", "json"})

MARKS = [f"'#{kind}'" for kind in sorted(_PYTHON_KINDS)]
"""The endings of such tensors' names, quoted for messages."""


def add_value(tensors: dict[str, torch.Tensor], key: str, value: Any) -> None:
    """Add one value of an optimizer's state, as itself or as the tensor that stands for it."""
    if isinstance(value, torch.Tensor):
        tensors[key] = value
    elif value is None:
        tensors[f"{key}#none"] = torch.empty(0, dtype=torch.uint8, device="cpu")
    elif type(value) is bool:
        tensors[f"{key}#bool"] = torch.tensor(value, device="cpu")
    elif type(value) is int and -(1 << 63) <= value < 1 << 63:
        tensors[f"{key}#int"] = torch.tensor(value, dtype=torch.int64, device="cpu")
    elif type(value) is float:
        tensors[f"{key}#float"] = torch.tensor(value, dtype=torch.float64, device="cpu")
    else:
        encoded = encode_objects(value, f"{key}#entry")
        tensors[f"{key}#json"] = torch.frombuffer(bytearray(encoded.json), dtype=torch.uint8)
        tensors |= encoded.entries | encoded.dtensors


_PICKLE = re.compile(rb'\{"\$pickle":\["(?:[^"\\]|\\.)*","((?:[^"\\]|\\.)*)"\]\}')


def pickled_values(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Path -> type of the values of optimizer states which hold something that `add_value` had to pickle."""
    found = {}
    for key, tensor in tensors.items():
        if key.endswith("#json") and type(tensor) is torch.Tensor:
            match = _PICKLE.search(tensor.numpy().tobytes())
            if match is not None:
                found[key.removesuffix("#json")] = match[1].decode()
    return found


def split_state_name(name: str) -> tuple[str, str]:
    """(name, kind) of a stored state name; the kind is "" for what was a tensor, `entry` for a part of a `json`."""
    base, entry, _ = name.partition("#entry")
    if entry:
        return base, "entry"
    base, mark, kind = name.rpartition("#")
    return (base, kind) if mark and kind in _PYTHON_KINDS else (name, "")


def python_value(kind: str, tensor: torch.Tensor) -> bool | int | float | None:
    """What a stored tensor of a `kind` other than `json` and `entry` stands for; the reverse of `add_value`."""
    return None if kind == "none" else tensor.item()
