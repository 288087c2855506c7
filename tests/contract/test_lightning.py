"""The same arguments through the strategy, where Lightning has no argument of its own."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist

from tests.lightning.harness import Model, loader, on_ranks, trainer, whole_weights
from tests.told import told_once, warned
from zero_ckpt import zero
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import DisagreementError
from zero_ckpt.lightning import load_module

WORLD = 2
STAGES = (0, 1, 2, 3)


class Frozen(Model):
    """The first block is frozen; hooks keep something of each rank."""

    def __init__(self, fill: float | None = None, schedule: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.fill, self.schedule = fill, schedule
        self.got: Any = None
        self.blocks[0].requires_grad_(False)
        if fill is not None:
            for p in self.blocks[0].parameters():
                torch.nn.init.constant_(p, fill)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1]
        others = [p for p in trained if p.ndim == 1]
        lr = self.hparams["lr"]
        groups = [{"params": matrices}, {"params": others, "lr": lr / 2, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        config = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config} if self.schedule else optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["per_rank_client_state"] = {"rank": dist.get_rank()}
        checkpoint["rng"] = "the user's"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.got = checkpoint.get("per_rank_client_state"), checkpoint["rng"]


def _save(root: Path, stage: int) -> dict[str, torch.Tensor]:
    L.seed_everything(1)
    options = {"exclude_frozen_parameters": True}
    run = trainer(root, stage, max_steps=2, strategy_options=options)
    model = Frozen(fill=1.0)
    run.fit(model, loader())
    run.save_checkpoint(root / "a.ckpt")
    return whole_weights(model)


def _resume(root: Path, stage: int) -> tuple[Any, ...]:
    model = Frozen(fill=2.0)
    run = trainer(root, stage, max_steps=3)
    run.fit(model, loader(), ckpt_path=str(root / "a.ckpt"))
    frozen = whole_weights(model)["blocks.0.lower.weight"]
    return model.got, frozen.unique().tolist(), run.global_step, run.strategy.load_report


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_stay_out_and_each_rank_gets_its_own_state(
    stage: int, tmp_path: Path
) -> None:
    saved = on_ranks(_save, WORLD, tmp_path, stage)[0]
    manifest = open_checkpoint(tmp_path / "a.ckpt").manifest
    assert {name.rpartition(".")[0] for name in manifest.excluded} == {
        "blocks.0.lower",
        "blocks.0.upper",
    }
    for rank, found in enumerate(on_ranks(_resume, WORLD, tmp_path, 3 - stage)):
        got, frozen, steps, report = found
        assert got == ({"rank": rank}, "the user's")
        assert frozen == [2]
        assert steps == 3
        assert (report.missing, report.unexpected) == ((), ())
        assert "blocks.0.lower.weight" in report.excluded
    module = load_module(Frozen, tmp_path / "a.ckpt", fill=3.0)
    assert module.blocks[0].lower.weight.unique().tolist() == [3]
    assert torch.equal(module.head.weight, saved["head.weight"])


def _start(root: Path) -> dict[str, torch.Tensor]:
    L.seed_everything(1)
    run = trainer(root, 2, max_steps=2)
    model = Frozen(lr=0.1)
    run.fit(model, loader())
    run.save_checkpoint(root / "a.ckpt")
    return whole_weights(model)


class Looking(Frozen):
    """Notes what a resumed fit begins with."""

    def on_train_start(self) -> None:
        (optimizer,) = self.trainer.optimizers
        holder = getattr(optimizer, "optim", optimizer)
        self.begin = (
            whole_weights(self),
            [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups],
            len(holder.state) > 0,
            self.trainer.lr_scheduler_configs[0].scheduler.last_epoch,
            self.trainer.global_step,
        )


PARTS: list[tuple[dict[str, bool], list[Any], bool, int, int]] = [
    ({}, [0.1 / 3, 0.05 / 3], True, 2, 2),
    ({"load_optimizer_states": False}, [0.4, 0.2], False, 2, 2),
    ({"load_lr_scheduler_states": False}, [0.1 / 3, 0.05 / 3], True, 0, 2),
    ({"load_module_only": True}, [0.4, 0.2], False, 0, 0),
    ({"override_hyperparameters": True}, [0.4, 0.2], True, 2, 2),
]


def _resume_parts(root: Path, stage: int) -> list[Any]:
    found = []
    for options, *_ in PARTS:
        model = Looking(lr=0.4)
        run = trainer(root, stage, max_steps=3, strategy_options=options)
        run.fit(model, loader(), ckpt_path=str(root / "a.ckpt"))
        found.append(model.begin)
    return found


def test_a_resumed_fit_takes_what_it_was_asked_to(tmp_path: Path) -> None:
    saved = on_ranks(_start, WORLD, tmp_path)[0]
    for stage in (1, 3):
        for found in on_ranks(_resume_parts, WORLD, tmp_path, stage):
            for (options, rates, moments, place, steps), begin in zip(PARTS, found, strict=True):
                weights, groups, has_state, epoch, global_step = begin
                assert torch.equal(weights["head.weight"], saved["head.weight"]), options
                assert [lr for lr, _ in groups] == pytest.approx(rates), options
                assert [decay for _, decay in groups] == [0.01, 0], options
                assert (has_state, epoch, global_step) == (moments, place, steps), options


def _other_scheduler(root: Path) -> list[str]:
    model = Frozen(schedule=False)
    run = trainer(root, 1, max_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, loader(), ckpt_path=str(root / "a.ckpt"))
    return [str(w.message) for w in caught if "LR scheduler" in str(w.message)]


def test_a_scheduler_on_one_side_is_a_warning(tmp_path: Path) -> None:
    on_ranks(_start, WORLD, tmp_path)
    (notice,), none = on_ranks(_other_scheduler, WORLD, tmp_path)
    assert "a.ckpt holds the state of the LR scheduler that the job has not" in notice
    assert none == []


def _paths(root: Path, mode: str) -> str | list[str]:
    run = trainer(root, 1, max_steps=1, strategy_options={"tag_validation": mode})
    run.fit(Model(), loader())
    path = root / f"{mode}{dist.get_rank()}.ckpt"
    if mode == "fail":
        with pytest.raises(DisagreementError) as caught:
            run.save_checkpoint(path)
        return str(caught.value)
    return warned(run.save_checkpoint, path)[1]


def test_different_paths_are_refused_or_told(tmp_path: Path) -> None:
    (text,) = told_once(on_ranks(_paths, WORLD, tmp_path, "warn"))
    assert "All ranks save to rank 0's" in text
    refused = on_ranks(_paths, WORLD, tmp_path, "fail")
    assert refused[0] == refused[1]
    assert sorted(name for name in os.listdir(tmp_path) if "ckpt" in name) == ["warn0.ckpt"]


class Clipped(Model):
    """Notes the norms of the gradients that the optimizer gets."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.norms.append(float(zero.clip_grad_norm_(self.parameters(), float("inf"))))

    def on_train_start(self) -> None:
        self.norms: list[float] = []


def _clip_anew(root: Path, stage: int) -> list[list[float]]:
    found = []
    for step, clip in enumerate((0.02, 0.0005, None), 1):
        model = Clipped()
        run = trainer(root, stage, max_steps=step, gradient_clip_val=clip)
        run.fit(model, loader(), ckpt_path=str(root / f"{step - 1}.ckpt") if step > 1 else None)
        run.save_checkpoint(root / f"{step}.ckpt")
        found.append(model.norms)
    return found


def test_the_new_runs_clip_value_counts_a_smaller_one_and_none(tmp_path: Path) -> None:
    for stage in (1, 3):
        for first, second, third in on_ranks(_clip_anew, WORLD, tmp_path / str(stage), stage):
            assert first == pytest.approx([0.02], rel=1e-3)
            assert second == pytest.approx([0.0005], rel=1e-3)
            assert len(third) == 1
            assert third[0] > 0.03
