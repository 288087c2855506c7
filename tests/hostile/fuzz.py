"""Fuzz one target with coverage feedback: `python -m tests.hostile.fuzz TARGET [SECONDS]`. Needs `pip install atheris`.

Begins with honest input and with what is kept in `corpus`. What it finds is written to `crash-...`: give that a name
that says what it is, and put it into `corpus/TARGET`, where `test_corpus` replays it for ever.
"""

from __future__ import annotations

import datetime
import json
import pickle
import random
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["zero_ckpt.core", "zero_ckpt.interop"]):
    from tests.hostile.targets import TARGETS

import numpy as np
import torch

from zero_ckpt import Checkpointer
from zero_ckpt.core.encoding import encode_objects

JSON = {"manifest", "header", "objects"}
CORPUS = Path(__file__).parent / "corpus"


TREES: list[dict[str, Any]] = [
    {"a": [1, 2.5, None, True, "text"], "b": {"c": (1, 2)}, 3: {4, 5}},
    {"array": np.ones(3), "scalar": np.float32(1), "tensor": torch.ones(2), "type": torch.bfloat16},
    {
        "bytes": b"123",
        "complex": 1j,
        "path": Path("/a"),
        "time": datetime.timedelta(1),
        "s": slice(1),
    },
    {"date": datetime.datetime(2020, 1, 1), "odict": OrderedDict(a=1), "size": torch.Size([1, 2])},
    {
        "device": torch.device("cpu"),
        "parameter": torch.nn.Parameter(torch.ones(1)),
        "c": Counter("ab"),
    },
]


def honest(folder: Path) -> dict[str, list[bytes]]:
    """What a real checkpoint gives each target."""
    model = torch.nn.Linear(3, 2)
    Checkpointer(model, torch.optim.Adam(model.parameters())).save_checkpoint(
        folder, "tag", client_state={"n": [1, 2.5, None, "text"], "t": torch.ones(2), "s": {1, 2}}
    )
    tag = folder / "tag"
    whole = (tag / "manifest.json").read_bytes()
    headers = []
    for path in tag.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        headers.append(data[8 : 8 + length].rstrip())
    return {
        "manifest": [whole[whole.index(b"\n") + 1 : -3]],
        "whole_manifest": [whole],
        "header": headers,
        "objects": [encode_objects(tree, "objects").json for tree in TREES],
        "latest": [b"tag\n", b"../other"],
        "pickle": [pickle.dumps({"a": [1, (2.5, None)], "b": {3}}, protocol=p) for p in (2, 4, 5)],
    }


NASTY = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "..", "/", [], {}]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Another tree where the bytes are JSON, now and then other bytes, as everywhere else."""
    dice = random.Random(seed)
    try:
        tree = json.loads(data)
        found = list(places(tree))
    except (ValueError, RecursionError, TypeError):
        found = []
    if not found or dice.random() < 0.2:
        return bytes(atheris.Mutate(data, max_size))
    for _ in range(dice.randint(1, 3)):
        container, key = dice.choice(found)
        other, its = dice.choice(found)
        try:
            value = dice.choice([*NASTY, other[its], other[its], other[its]])
            if isinstance(container, dict) and dice.random() < 0.3:
                container[str(value)] = container.pop(key)
            elif dice.random() < 0.1:
                del container[key]
            else:
                container[key] = json.loads(json.dumps(value))
        except (KeyError, IndexError, TypeError, RecursionError):  # it was taken away by now
            continue
    changed = json.dumps(tree).encode()
    return changed if len(changed) <= max_size else data


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    with tempfile.TemporaryDirectory() as root:
        seeds = Path(root) / "seeds"
        seeds.mkdir()
        for number, data in enumerate(honest(Path(root) / "run")[name]):
            (seeds / str(number)).write_bytes(data)
        kept = [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
        options = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096"]
        mutator = {"custom_mutator": mutate_json} if name in JSON else {}
        atheris.Setup([sys.argv[0], *options, str(seeds), *kept], TARGETS[name], **mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
