"""Models that are not just modules: made on the meta device, sharded by users, compiled, tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

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


class Late(Model):
    """Makes its layers in configure_model, on the meta device where asked."""

    def __init__(self, meta: bool, shard: bool = False) -> None:
        super().__init__()
        self.meta, self.shard = meta, shard
        del self.blocks, self.head
        self.blocks: Any = None

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        with torch.device("meta" if self.meta else "cpu"):
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(FEATURES, 3, bias=False)
        if self.shard:
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            for block in self.blocks:
                fully_shard(block, mesh=mesh)


class Tensorwise(Late):
    """Tensor parallelism within blocks, and sharding by its user or by the strategy."""

    def __init__(self, by_user: bool) -> None:
        super().__init__(meta=False)
        self.by_user = by_user

    def configure_model(self) -> None:
        if self.blocks is None:
            super().configure_model()
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            for block in self.blocks:
                plan = {"lower": ColwiseParallel(), "upper": RowwiseParallel()}
                parallelize_module(block, mesh["tensor"], plan)
            if self.by_user:
                fully_shard(self, mesh=mesh["data"])


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Linear(FEATURES, 3, bias=False)
        self.back.weight = self.head.weight

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) + self.back(batch[0]).square().mean()


def _model(kind: str) -> Model:
    if kind == "compiled":
        model = Model()
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
        return model
    return {
        "late": lambda: Late(meta=False),
        "meta": lambda: Late(meta=True),
        "sharded": lambda: Late(meta=False, shard=True),
        "sharded meta": lambda: Late(meta=True, shard=True),
        "tied": Tied,
    }[kind]()


def _round(root: Path, stage: int, kind: str) -> Any:
    """Train, save, resume; returns what was saved, what was resumed with, and the types."""
    L.seed_everything(6)
    model = _model(kind)
    run = trainer(root, stage, max_steps=4)
    run.fit(model, loader())
    saved = Probe()
    saved.on_train_start(run, model)
    path = root / f"{kind}{stage}.ckpt"
    run.save_checkpoint(path)
    L.seed_everything(60)
    resumed = Probe()
    fresh = _model(kind)
    again = trainer(root, stage, max_steps=6, callbacks=[resumed])
    again.fit(fresh, loader(), ckpt_path=str(path))
    again.test(fresh, loader(8), str(path), verbose=False)
    kinds = [isinstance(p, DTensor) for p in fresh.parameters()]
    return saved.seen, resumed.seen, kinds, [loss for _, loss in fresh.losses]


def _rounds(root: Path, kind: str, stages: tuple[int, ...]) -> list[Any]:
    return [_round(root, stage, kind) for stage in stages]


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("late", (0, 3)),
        ("meta", (1, 2, 3)),
        ("sharded", (2, 3)),
        ("sharded meta", (2, 3)),
        ("compiled", (0, 2, 3)),
        ("tied", (0, 2, 3)),
    ],
)
def test_model_trains_saves_and_resumes(tmp_path: Path, kind: str, stages: tuple[int, ...]) -> None:
    results = on_ranks(_rounds, 2, tmp_path, kind, stages)
    for rank, rounds in enumerate(results):
        for stage, (saved, resumed, kinds, losses) in zip(stages, rounds, strict=True):
            if rank == 0:
                assert_same(saved, resumed)
            assert all(kinds) == (stage >= 2)
            if "meta" not in kind:
                assert losses == pytest.approx(rounds[0][3], rel=1e-5)
    if kind == "tied":
        with open_checkpoint(tmp_path / "tied3.ckpt") as checkpoint:
            assert checkpoint.manifest.aliases == {"back.weight": "head.weight"}
    if kind == "compiled":
        with open_checkpoint(tmp_path / "compiled3.ckpt") as checkpoint:
            assert "blocks.1.lower.weight" in checkpoint.keys("model")


class Failing(Model):
    """Stops once in the middle of a pass."""

    fail_in = ""

    def loss(self, batch: Any) -> torch.Tensor:
        if self.fail_in == "forward" and self.global_step == 2:
            self.blocks[0](batch[0])
            raise ValueError
        return super().loss(batch)

    def on_after_backward(self) -> None:
        if self.fail_in == "backward" and self.global_step == 2:
            raise ValueError


def _again(root: Path, stage: int, fail_in: str) -> list[float]:
    L.seed_everything(1)
    model = Failing()
    model.fail_in = fail_in
    first = trainer(root, stage, max_steps=2 if not fail_in else 4)
    if fail_in:
        with pytest.raises(ValueError):  # noqa: PT011 - the model's own
            first.fit(model, loader())
    else:
        first.fit(model, loader())
    model.fail_in = ""
    trainer(root, stage, max_steps=4).fit(model, loader())
    return [loss for _, loss in model.losses[-4:]]


def _again_after_failures(root: Path) -> list[Any]:
    ways = ("", "forward", "backward")
    return [[_again(root, stage, fail_in) for fail_in in ways] for stage in (2, 3)]


def test_a_model_whose_run_failed_within_a_pass_trains_again(tmp_path: Path) -> None:
    for stages in on_ranks(_again_after_failures, 2, tmp_path):
        for expected, *others in stages:
            assert others == [expected] * 2


class Traceable(Model):
    """Steps without Lightning's logging, which torch.compile cannot trace."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


def _compiled(root: Path, stage: int) -> Any:
    L.seed_everything(6)
    model = Traceable()
    run = trainer(root, stage, max_steps=3)
    run.fit(torch.compile(model, backend="eager"), loader())
    run.save_checkpoint(root / "whole.ckpt")
    fresh = Traceable()
    trainer(root, stage).test(
        torch.compile(fresh, backend="eager"), loader(8), str(root / "whole.ckpt"), verbose=False
    )
    return whole_weights(model), whole_weights(fresh)


def _compiled_everywhere(root: Path) -> list[Any]:
    return [_compiled(root, stage) for stage in (0, 1, 2, 3)]


def test_a_compiled_lightning_module_trains_at_every_stage(tmp_path: Path) -> None:
    results = on_ranks(_compiled_everywhere, 2, tmp_path)[0]
    for trained, loaded in results:
        assert_same(trained, loaded)
        for key, value in trained.items():
            torch.testing.assert_close(value, results[0][0][key])


def _tensor_parallel(root: Path, by_user: bool) -> Any:
    L.seed_everything(6)
    model = Tensorwise(by_user)
    run = trainer(root, 3, max_steps=4)
    run.fit(model, loader())
    saved = Probe()
    saved.on_train_start(run, model)
    run.save_checkpoint(root / f"{by_user}.ckpt")
    L.seed_everything(60)
    resumed = Probe()
    fresh = Tensorwise(by_user)
    again = trainer(root, 3, max_steps=5, callbacks=[resumed])
    again.fit(fresh, loader(), ckpt_path=str(root / f"{by_user}.ckpt"))
    placed = str(fresh.blocks[0].upper.weight.placements)
    return saved.seen, resumed.seen, placed, model.losses


def _tensor_parallel_ways(root: Path) -> list[Any]:
    return [_tensor_parallel(root, by_user) for by_user in (True, False)]


class Scale(nn.Module):
    """Cannot be initialized again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FEATURES))


class Uninitializable(Late):
    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "extra"):
            with torch.device("meta"):
                self.extra = Scale()


def _without_initializer(root: Path) -> None:
    for stage in (1, 2):
        with pytest.raises(ConfigurationError, match=r"meta.*extra \(Scale\)"):
            trainer(root, stage).fit(Uninitializable(meta=True), loader())


def test_what_cannot_be_initialized_is_named_by_the_error_that_ends_fit(tmp_path: Path) -> None:
    """Not the one that Lightning's teardown gets when it moves a model without memory."""
    on_ranks(_without_initializer, 2, tmp_path)


def _data_parallel(root: Path) -> Any:
    L.seed_everything(6)
    model = Late(meta=False)
    trainer(root, 0, max_steps=4).fit(model, loader())
    return model.losses


def test_tensor_parallelism_is_honoured(tmp_path: Path) -> None:
    expected = on_ranks(_data_parallel, 2, tmp_path)
    for rank, ways in enumerate(on_ranks(_tensor_parallel_ways, 4, tmp_path)):
        for saved, resumed, placed, losses in ways:
            assert_same(saved["weights"], resumed["weights"]) if rank == 0 else None
            assert_same(saved["states"], resumed["states"])
            assert "Shard(dim=0)" in placed or "StridedShard" in placed
            assert "Shard(dim=1)" in placed
            # Two ranks share a model, so four see the data of two.
            assert [x for _, x in losses] == pytest.approx(
                [x for _, x in expected[rank // 2]], rel=1e-5
            )
