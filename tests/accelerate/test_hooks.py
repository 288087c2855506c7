"""Accelerate's hooks keep their contract: what they take out is neither written nor loaded."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.accelerate.harness import batches, make, on_ranks, state_of, train
from zero_ckpt.accelerate import attach
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import StateMismatchError, ZeroCkptError

KINDS = ["plain", 3, "fsdp2"]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_get_what_accelerate_gives_them(kind: Any, tmp_path: Path) -> None:
    on_ranks(arguments, 2, str(tmp_path / "out"), kind)


def arguments(out: str, kind: Any) -> None:
    made = make(kind)
    accelerator = made[0]
    seen: list[Any] = []

    def on_save(models: Any, weights: Any, output_dir: str) -> None:
        assert os.path.isdir(output_dir)
        seen.append((models is accelerator._models, [list(w) for w in weights], output_dir))

    def on_load(models: Any, input_dir: str) -> None:
        seen.append(([m is accelerator._models[0] for m in models], input_dir))

    first = accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)
    accelerator.save_state(out)
    accelerator.load_state(out)
    accelerator.load_state(f"{out}/global_step0")
    keys = [] if kind == "fsdp2" else [list(accelerator._models[0].state_dict())]
    models = [] if kind == "fsdp2" else [True]
    assert seen == [(True, keys, out), (models, out), (models, out)]
    first.remove()
    accelerator.save_state(out)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["plain", 2])
def test_weights_that_main_alone_removes_are_nobodys(kind: Any, tmp_path: Path) -> None:
    on_ranks(removed, 2, str(tmp_path), kind)


def removed(out: str, kind: Any) -> None:
    made = make(kind)
    accelerator, model = made[:2]
    train(made, batches(1))

    def on_save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            for _ in models:
                weights.pop()
            Path(output_dir, "mine").write_text("own file")

    def on_load(models: list[Any], input_dir: str) -> None:
        assert Path(input_dir, "mine").read_text() == "own file"
        while models:
            models.pop()

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.save_state(out)
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.keys("model") == []
        assert checkpoint.keys("optim")
    with pytest.raises(StateMismatchError, match="Missing in the checkpoint"):
        accelerator.load_state(out)
    before = state_of(made)["optimizer"]
    train(made, batches(1))
    with torch.no_grad():
        model.module.shift.fill_(9) if kind == "plain" else None
    accelerator.register_load_state_pre_hook(on_load)
    accelerator.load_state(out)
    after = state_of(made)
    assert all(torch.equal(before[key], after["optimizer"][key]) for key in before)
    if kind == "plain":
        assert after["weights"]["shift"].tolist() == [9, 9, 9]


def test_one_of_two_models_and_single_keys(tmp_path: Path) -> None:
    on_ranks(edited, 2, str(tmp_path))


def edited(out: str) -> None:
    accelerator = attach(Accelerator(cpu=True))
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    accelerator.prepare(first, second)

    def on_save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        weights.pop(0)
        if accelerator.is_main_process:
            del weights[0]["bias"]
            weights[0]["weight"] = torch.full((2, 2), 7.0)

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.save_state(out)
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.keys("model") == ["1.weight"]
        assert checkpoint.tensor("model", "1.weight").tolist() == [[7, 7], [7, 7]]

    accelerator.register_load_state_pre_hook(lambda models, _: models.remove(first))
    with pytest.raises(StateMismatchError, match=r"1\.bias"):
        accelerator.load_state(out)
    accelerator.load_state(out, strict=False)
    assert second.weight.tolist() == [[7, 7], [7, 7]]
    assert first.weight.tolist() != [[7, 7], [7, 7]]


def test_whole_state_dicts_may_be_exchanged(tmp_path: Path) -> None:
    on_ranks(exchanged, 2, str(tmp_path))


def exchanged(out: str) -> None:
    made = make(3)
    accelerator = made[0]

    def on_save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        weights[0] = {"shift": torch.zeros(3, dtype=torch.bfloat16)}

    handle = accelerator.register_save_state_pre_hook(on_save)
    accelerator.save_state(out)
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.keys("model") == ["shift"]
        assert checkpoint.tensor("model", "shift").dtype == torch.bfloat16
    handle.remove()

    accelerator.register_save_state_pre_hook(lambda models, weights, path: weights.append({}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        accelerator.save_state(out)
    texts = [str(each.message) for each in told]
    assert any("1 state dicts that belong to no" in t for t in texts) is accelerator.is_main_process
    with open_checkpoint(out) as checkpoint:
        assert len(checkpoint.keys("model")) > 1


def test_a_hook_that_fails_on_one_rank_fails_the_save_on_all(tmp_path: Path) -> None:
    on_ranks(failing, 2, str(tmp_path))


def failing(out: str) -> None:
    accelerator = make()[0]

    def on_save(*_: Any) -> None:
        if not accelerator.is_main_process:
            raise KeyError("mine")

    handle = accelerator.register_save_state_pre_hook(on_save)
    if accelerator.is_main_process:
        with pytest.raises(ZeroCkptError, match="rank 1: KeyError: 'mine'"):
            accelerator.save_state(out)
    else:
        with pytest.raises(KeyError, match="mine"):
            accelerator.save_state(out)
    handle.remove()
    assert accelerator.save_state(out) == Path(out)
