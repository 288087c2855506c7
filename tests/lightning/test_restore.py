"""Restoring into other stages and world sizes, from other files, and what hooks may do to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from tests.lightning.harness import (
    FEATURES,
    Model,
    Probe,
    assert_same,
    loader,
    on_ranks,
    trainer,
)


def _train(root: Path, stage: int, name: str, model: Any = None, **options: Any) -> Any:
    """Train a little, save, and return what was saved, whole."""
    L.seed_everything(3)
    model = model or Model()
    run = trainer(root, stage, max_steps=5, **options)
    run.fit(model, loader())
    probe = Probe()
    probe.on_train_start(run, model)
    run.save_checkpoint(root / name)
    return probe.seen


def _resume(root: Path, stage: int, path: Any, model: Any = None, **options: Any) -> dict[str, Any]:
    """What a resumed run starts training with."""
    L.seed_everything(99)
    probe = Probe()
    fit = {key: options.pop(key) for key in ("weights_only",) if key in options}
    callbacks = [probe, *options.pop("callbacks", [])]
    run = trainer(root, stage, max_steps=6, callbacks=callbacks, **options)
    run.fit(model or Model(), loader(), ckpt_path=str(path), **fit)
    assert run.global_step == 6
    return probe.seen


def _save_at_all_stages(root: Path) -> list[Any]:
    return [_train(root, stage, f"stage{stage}.ckpt") for stage in range(4)]


PAIRS = {
    1: [(1, 2), (2, 0), (3, 1)],
    2: [(0, 3), (1, 0), (2, 1), (3, 2)],
    3: [(0, 1), (1, 3), (3, 0)],
}


def _resume_pairs(root: Path, pairs: list[tuple[int, int]]) -> list[Any]:
    warnings.filterwarnings("ignore", ".*was saved by 2 ranks and is resumed by")
    return [_resume(root, stage, root / f"stage{saved}.ckpt") for saved, stage in pairs]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_stage_and_world_size_resumes_any_other(tmp_path: Path, world_size: int) -> None:
    saved = on_ranks(_save_at_all_stages, 2, tmp_path)[0]
    pairs = PAIRS[world_size]
    for resumed in on_ranks(_resume_pairs, world_size, tmp_path, pairs):
        for (stage, _), seen in zip(pairs, resumed, strict=True):
            assert_same(saved[stage], seen)


def _file_into_all_stages(root: Path) -> tuple[Any, list[Any]]:
    path = root / "plain.ckpt"
    plain = _train(root, 0, "plain.ckpt", strategy="ddp")
    assert path.is_file()
    return plain, [_resume(root, stage, path) for stage in range(4)]


def test_a_file_of_lightnings_own_resumes_at_any_stage(tmp_path: Path) -> None:
    results = on_ranks(_file_into_all_stages, 2, tmp_path)
    plain = results[0][0]  # rank 0's buffers are the ones that are saved
    for _, resumed in results:
        for seen in resumed:
            assert_same(plain, seen)


class TiedAndFrozen(Model):
    """A frozen weight with two names, as the embedding of a language model that only trains adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)
        self.again = torch.nn.Linear(FEATURES, 8, bias=False)
        self.again.weight = self.blocks[0].lower.weight

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


def _tied_and_left_out(root: Path, stage: int) -> None:
    left_out = {"strategy_options": {"exclude_frozen_parameters": True}}
    saved = _train(root, stage, "a.ckpt", TiedAndFrozen(), **left_out)
    model = TiedAndFrozen()
    found = _resume(root, 3 - stage, root / "a.ckpt", model)
    for name in (name for name, p in model.named_parameters() if p.requires_grad):
        assert_same(found["weights"][name], saved["weights"][name], name)


@pytest.mark.parametrize("stage", [1, 2])
def test_all_names_of_a_frozen_weight_may_be_left_out(stage: int, tmp_path: Path) -> None:
    on_ranks(_tied_and_left_out, 2, tmp_path, stage)
