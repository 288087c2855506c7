"""What a load leaves out is told once for the job."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.workers import run_ranks
from zero_ckpt import load_checkpoint, save_checkpoint


def parts(*names: str) -> nn.ModuleDict:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    for layer in model.values():
        fully_shard(layer)
    return model


def save(directory: str) -> None:
    save_checkpoint(directory, parts("a", "b"), step=1)


def load_loosely(directory: str) -> tuple[list[str], tuple[str, ...]]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zero_ckpt").addHandler(handler)
    result = load_checkpoint(directory, parts("a", "new"), load_module_strict=False)
    return told, result.report.missing


def test_rank_0_logs_what_was_left_out_and_every_rank_has_it_in_its_report(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path))
    (first, missing), (second, also_missing) = run_ranks(load_loosely, 2, str(tmp_path))
    assert len(first) == 2
    assert "kept as it was: 'new.weight', 'new.bias'" in first[0]
    assert "not loaded: 'b.weight', 'b.bias'" in first[1]
    assert second == []
    assert missing == also_missing == ("new.weight", "new.bias")
