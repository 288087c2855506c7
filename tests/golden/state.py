"""The state that the golden checkpoints hold. Values follow from names and shapes, so nothing is stored twice.

Nothing here may change: the files beside it were made from it.
"""

from __future__ import annotations

import datetime
import decimal
import pathlib
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch
from torch import nn

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "C128": torch.complex128,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def numbers(start: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`start`, `start` + 1, ... in row-major order."""
    count = int(np.prod(shape))
    return (torch.arange(count) + start).reshape(shape).to(dtype)


def typed_tensors() -> dict[str, torch.Tensor]:
    """One tensor of each type: 5 x 3, which two ranks hold as 3 + 2 rows."""
    return {name: numbers(1, 5, 3, dtype=dtype) for name, dtype in DTYPES.items()}


def objects() -> dict[str, Any]:
    """A value of each type that a checkpoint keeps without a pickle, and one that needs it."""
    shared = numbers(40, 2, 2)
    zone = datetime.timezone(datetime.timedelta(hours=2))
    return {
        "none": None,
        "bools": [True, False],
        "numbers": [0, -1, 2**63, -(2**70), 1.5, float("inf"), -0.0, 2 - 0.5j],
        "text": 'line\n"quoted" \u00e9',
        "tuple": (1, (2, [3])),
        "sets": [{3, 1, 2}, frozenset({"a"})],
        "slice": slice(1, None, 2),
        "range": range(2, 9, 3),
        "dicts": [
            {"$key": 1},
            {1: "a", (2, 3): "b"},
            OrderedDict(b=1, a=2),
            Counter("aab"),
            defaultdict(list, {"x": [1]}),
        ],
        "bytes": [b"\x00\xff", bytearray(b"ab")],
        "path": pathlib.Path("a/b"),
        "times": [
            datetime.date(2024, 2, 29),
            datetime.datetime(2024, 2, 29, 12, 30, 1, 250, tzinfo=zone),
            datetime.timedelta(days=-1, microseconds=7),
        ],
        "tensors": {"twice": [shared, shared], "scalar": torch.tensor(3, dtype=torch.int16)},
        "parameters": [nn.Parameter(numbers(7, 2)), nn.Parameter(numbers(9, 2), False)],
        "arrays": [np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(3, dtype=">f4")],
        "scalars": [np.float32(0.1), np.int64(-7), np.bool_(True)],
        "torch": [torch.bfloat16, torch.device("cuda", 1), torch.Size([2, 3])],
        "pickled": decimal.Decimal("1.10"),
    }


class Net(nn.Module):
    """A tied pair, a frozen parameter, buffers, and a parameter that has no optimizer state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
        self.unused = nn.Parameter(torch.empty(2))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def model_values() -> dict[str, torch.Tensor]:
    """The whole tensors of a `Net`, by the names of its `state_dict`."""
    return {
        "embed.weight": numbers(100, 5, 3),
        "norm.weight": numbers(200, 3),
        "norm.bias": numbers(210, 3),
        "norm.running_mean": numbers(220, 3),
        "norm.running_var": numbers(230, 3),
        "norm.num_batches_tracked": torch.tensor(11),
        "frozen.weight": numbers(300, 3, 3),
        "unused": numbers(400, 2),
        "head.weight": numbers(100, 5, 3),
    }


def optimizer_values() -> dict[str, dict[str, torch.Tensor]]:
    """Parameter -> Adam's state."""
    return {
        name: {
            "step": torch.tensor(7.0),
            "exp_avg": numbers(1000 + start, *shape),
            "exp_avg_sq": numbers(2000 + start, *shape),
        }
        for start, (name, shape) in enumerate(
            {"embed.weight": (5, 3), "norm.weight": (3,), "norm.bias": (3,)}.items()
        )
    }
