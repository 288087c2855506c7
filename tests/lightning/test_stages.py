"""Stages 1, 2 and 3 train like stage 0 (DDP), whatever a Lightning user turns on."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.tensor import DTensor

from tests.lightning.harness import (
    FEATURES,
    Block,
    Model,
    Probe,
    assert_same,
    loader,
    on_ranks,
    trainer,
    whole_weights,
)
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import ConfigurationError


class Gan(L.LightningModule):
    """Two optimizers, manual optimization, and a parameter of the module itself in both losses."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(Block(), Block())
        self.critic = nn.Sequential(Block(), nn.Linear(FEATURES, 1))
        self.gain = nn.Parameter(torch.ones(FEATURES))
        self.losses: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        with first.toggle_model():
            fake = self.generator(batch[0] * self.gain)
            loss = -self.critic(fake).mean()
            self.manual_backward(loss)
            self.clip_gradients(first, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            first.step()
            first.zero_grad()
        with second.toggle_model():
            fake = self.generator(batch[0] * self.gain).detach()
            gap = self.critic(fake).mean() - self.critic(batch[0]).mean()
            self.manual_backward(gap + 0.01 * self.gain.square().sum())
            second.step()
            second.zero_grad()
        self.losses.append((batch_idx, loss.item() + gap.item()))
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam([*self.generator.parameters(), self.gain], lr=0.02)
        second = torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.9)
        make = torch.optim.lr_scheduler.ExponentialLR
        return [first, second], [make(first, 0.9), make(second, 0.8)]


class OwnClipping(Model):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, 0.2, gradient_clip_algorithm="norm")


class Drifting(Model):
    """A buffer follows the rank's own batches, and the loss depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x) + self.center
        if self.training:
            self.center.lerp_(x.detach().mean(0)[:3], 0.5)
        return result


def _options(feature: str) -> dict[str, Any]:
    if feature == "16-mixed":  # Lightning itself uses a scaler on CUDA only
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    return {
        "plain": {},
        "accumulate": {"accumulate_grad_batches": 4},
        "buffer": {"accumulate_grad_batches": 3},
        "norm": {"gradient_clip_val": 0.3},
        "value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        "own clipping": {},
        "manual": {"strategy_options": {"find_unused_parameters": True}},
        "bf16-mixed": {"precision": "bf16-mixed"},
        "bf16-true": {"precision": "bf16-true"},
        "64-true": {"precision": "64-true"},
    }[feature]


def _train(root: Path, stage: int, feature: str) -> tuple[Any, dict[str, torch.Tensor]]:
    L.seed_everything(5)
    models = {"manual": Gan, "own clipping": OwnClipping, "buffer": Drifting}
    model = models.get(feature, Model)()
    options = _options(feature)
    run = trainer(root, stage, max_epochs=2, **options)
    run.fit(model, loader(64, shuffle=True), None if feature == "manual" else loader(16))
    return model.losses, whole_weights(model)


def _all_stages(root: Path, feature: str) -> list[Any]:
    return [_train(root, stage, feature) for stage in range(4)]


# Norms of gradients are summed in another order; the rest is exact to float32.
TOLERANCES = {
    "norm": 3e-5,
    "own clipping": 3e-5,
    "manual": 3e-5,
    "bf16-mixed": 2e-2,
    "16-mixed": 2e-3,
    "bf16-true": 1e-1,
}


@pytest.mark.parametrize(
    "feature",
    [
        "plain",
        "accumulate",
        "buffer",
        "norm",
        "value",
        "own clipping",
        "manual",
        "bf16-mixed",
        "16-mixed",
        "bf16-true",
        "64-true",
    ],
)
def test_every_stage_trains_like_ddp(tmp_path: Path, feature: str) -> None:
    tolerance = TOLERANCES.get(feature, 2e-6)
    for expected, *others in on_ranks(_all_stages, 2, tmp_path, feature):
        losses, weights = expected
        assert len(losses) > 8
        assert losses[0][1] != losses[-1][1]
        for new_losses, new_weights in others:
            assert new_losses == [(i, pytest.approx(loss, rel=tolerance)) for i, loss in losses]
            for key, value in weights.items():
                torch.testing.assert_close(
                    new_weights[key], value, rtol=tolerance * 10, atol=tolerance, msg=key
                )


def _prune_and_resume(root: Path) -> None:
    for stage in (0, 1):
        L.seed_everything(5)
        callbacks = [
            ModelPruning("l1_unstructured", amount=0.3),
            ModelCheckpoint(root / str(stage), filename="{epoch}", save_top_k=-1),
        ]
        model = Model()
        trainer(root, stage, max_epochs=3, callbacks=callbacks).fit(model, loader())
        resumed = Model()
        run = trainer(root, stage, max_epochs=2, callbacks=[ModelPruning("l1_unstructured")])
        run.fit(resumed, loader(), ckpt_path=str(root / str(stage) / "epoch=0.ckpt"))
        assert resumed.losses[0] == next(loss for loss in model.losses if loss[0] == 6)
        with open_checkpoint(root / str(stage) / "epoch=0.ckpt") as checkpoint:
            assert "head.weight/exp_avg" in checkpoint.keys("optim")
            assert "head.weight" not in checkpoint.manifest.buffers


def test_a_pruned_model_resumes_where_weights_are_whole(tmp_path: Path) -> None:
    on_ranks(_prune_and_resume, 2, tmp_path)


def _prune(root: Path) -> list[str]:
    told = []
    for stage in (1, 2, 3):
        run = trainer(root, stage, max_epochs=1, callbacks=[ModelPruning("l1_unstructured")])
        try:
            run.fit(Model(), loader())
        except ConfigurationError as error:
            told.append(str(error))
    return told


def test_pruning_is_refused_where_weights_are_sharded(tmp_path: Path) -> None:
    for told in on_ranks(_prune, 2, tmp_path):
        assert [text.partition("stage=")[2][0] for text in told] == ["2", "3"]
        assert all("ModelPruning works on whole weights" in text for text in told)


def _alone(root: Path, stage: int) -> tuple[bool, Any]:
    model = Model()
    run = trainer(root, stage, max_steps=6)
    run.fit(model, loader())
    run.save_checkpoint(root / "six.ckpt")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model).state_dict()))
    plain = not any(isinstance(value, DTensor) for value in twin.values())
    return plain, twin


def _go_on(root: Path, stage: int, path: Path) -> Any:
    warnings.filterwarnings("ignore", ".*was saved by 1 rank and is resumed by")
    probe = Probe()
    run = trainer(root, stage, max_steps=8, callbacks=[probe])
    run.fit(Model(), loader(), ckpt_path=str(path))
    return probe.seen["weights"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_alone_keeps_its_model_plain_and_several_go_on_from_it(
    tmp_path: Path, stage: int
) -> None:
    [(plain, weights)] = on_ranks(_alone, 1, tmp_path, stage)
    assert plain
    for seen in on_ranks(_go_on, 2, tmp_path / "on", stage, tmp_path / "six.ckpt"):
        assert_same(seen, weights)


def _hybrid(root: Path, stage: int) -> list[Any]:
    found = []
    for own, options in ((0, {}), (stage, {"strategy_options": {"sharding_size": 2}})):
        L.seed_everything(5)
        model = Model()
        run = trainer(root, own, max_steps=6, **options)
        run.fit(model, loader(64, shuffle=True))
        found.append((model.losses, whole_weights(model)))
        run.save_checkpoint(root / f"stage-{own}.ckpt")
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_two_copies_of_a_sharded_model_train_like_ddp_and_are_stored_once(
    tmp_path: Path, stage: int
) -> None:
    results = on_ranks(_hybrid, 4, tmp_path, stage)
    for (losses, weights), (new_losses, new_weights) in results:
        assert new_losses == [(i, pytest.approx(loss, rel=2e-6)) for i, loss in losses]
        for key, value in weights.items():
            torch.testing.assert_close(new_weights[key], value, rtol=2e-5, atol=2e-6, msg=key)
    bytes_of = {
        own: sum(file.stat().st_size for file in (tmp_path / f"stage-{own}.ckpt").glob("model-*"))
        for own in (0, stage)
    }
    assert bytes_of[stage] < 2 * bytes_of[0]
    trained = results[0][1][1]
    for seen in on_ranks(_go_on_from, 2, tmp_path / "on", tmp_path / f"stage-{stage}.ckpt"):
        assert_same(seen, trained)


def _go_on_from(root: Path, path: Path) -> Any:
    warnings.filterwarnings("ignore", ".*was saved by 4 ranks and is resumed by")
    probe = Probe()
    run = trainer(root, 2, max_steps=8, callbacks=[probe])
    run.fit(Model(), loader(), ckpt_path=str(path))
    return probe.seen["weights"]


def _take_turns(root: Path, stages: tuple[int, ...]) -> list[Any]:
    found: list[Any] = []
    for stage in stages:
        L.seed_everything(5)
        model = Gan()
        try:
            trainer(root, stage, max_steps=8).fit(model, loader(32))
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append(model.losses)
    return found


def test_optimizers_that_take_turns_need_no_option_in_one_process(tmp_path: Path) -> None:
    [(replicated, partitioned, sharded)] = on_ranks(_take_turns, 1, tmp_path, (0, 1, 2))
    assert len(sharded) == 4
    assert replicated == partitioned
    assert replicated == [(i, pytest.approx(loss, rel=2e-6)) for i, loss in sharded]


def test_what_ddp_refuses_is_told_with_this_strategys_remedy(tmp_path: Path) -> None:
    for (refusal,) in on_ranks(_take_turns, 2, tmp_path, (1,)):
        assert "ZeroStrategy(stage=1, find_unused_parameters=True), or stage 2 or 3" in refusal


class Whole(torch.optim.SGD):
    """Mixes whole tensors with its parameters, as optimizers do that keep matrices of statistics."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.add_(torch.ones(p.shape))
        return loss


class SteppingOnWhole(Model):
    def configure_optimizers(self) -> Any:
        return Whole(self.parameters(), lr=0.1)


def _step_on_parts(root: Path, stage: int) -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)mixed.*Whole cannot step on .*Strategy\(stage=1\)"
    ):
        trainer(root, stage, max_steps=1).fit(SteppingOnWhole(), loader())
    trainer(root, 1, max_steps=1).fit(SteppingOnWhole(), loader())


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_that_cannot_step_on_parts_names_the_stage_that_can(
    stage: int, tmp_path: Path
) -> None:
    on_ranks(_step_on_parts, 2, tmp_path, stage)


def _count_backward(root: Path) -> int:
    run = trainer(root, 2, max_steps=3)
    with patch.object(Strategy, "backward", wraps=run.strategy.backward) as backward:
        run.fit(Model(), loader())
    return backward.call_count


def test_backward_is_lightnings_own_so_that_a_test_may_watch_it(tmp_path: Path) -> None:
    assert on_ranks(_count_backward, 1, tmp_path) == [3]
