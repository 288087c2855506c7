"""What users' hooks see and may change, strictness, unsafe objects, and forms of `ckpt_path`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics import MeanMetric

from tests.lightning.harness import FEATURES, Model, loader, on_ranks, trainer, whole, whole_weights
from tests.told import warned
from zero_ckpt import save_checkpoint
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import CorruptShardError, SaveError, UnsafeObjectError, ZeroCkptError
from zero_ckpt.lightning.kept import HandedOut

STAGES = (0, 1, 2, 3)


class Secret:
    """An object that only a pickle can hold."""

    def __init__(self, value: int) -> None:
        self.value = value


class Hooked(Model):
    """Puts tensors and shards anywhere into the checkpoint, and edits what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.found: dict[str, Any] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        live = self.blocks[0].lower.weight
        checkpoint["mine"] = {"numbers": torch.arange(4.0), "nested": [{"part": live * 2}]}
        del checkpoint["state_dict"]["scale"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.events.append("module on_load_checkpoint")
        mine = checkpoint["mine"]
        self.found = {
            "numbers": mine["numbers"] + 0,
            "part": mine["nested"][0]["part"] + 0,
            "lower": checkpoint["state_dict"]["blocks.0.lower.weight"] + 0,
        }
        checkpoint["state_dict"]["scale"] = torch.tensor([1.0, 2.0, 3.0])
        checkpoint["state_dict"]["head.weight"] = torch.full((3, FEATURES), 0.5)
        checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.25
        moment = checkpoint["optimizer_states"][0]["state"]["head.weight"]
        moment["exp_avg"] = torch.full((3, FEATURES), 7.0)

    def on_fit_start(self) -> None:
        self.events.append("module on_fit_start")
        self.found["weights"] = whole_weights(self)

    def on_train_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        inner = getattr(optimizer, "optim", optimizer)
        for parameter, state in inner.state.items():
            if parameter is self.head.weight:
                self.found["moment"] = whole(state["exp_avg"]).clone()
        self.found["lr"] = optimizer.param_groups[0]["lr"]


class Stateful(L.Callback):
    def __init__(self, model: Hooked) -> None:
        self.model = model
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": 5}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        self.model.events.append("callback load_state_dict")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.model.events.append(f"callback on_fit_start {self.count}")


class Looking(Stateful):
    """Looks at the weights as early as it can."""

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.model.found["early"] = whole(pl_module.head.weight).clone()


def _hooks(root: Path, stage: int, callback: type[Stateful]) -> Any:
    L.seed_everything(1)
    model = Hooked()
    run = trainer(root, stage, max_steps=3, callbacks=[callback(model)])
    run.fit(model, loader())
    saved = whole_weights(model)
    run.save_checkpoint(root / f"stage{stage}.ckpt")
    model = Hooked()
    run = trainer(root, stage, max_steps=4, callbacks=[callback(model)])
    run.fit(model, loader(), ckpt_path=str(root / f"stage{stage}.ckpt"))
    return saved, model.events, model.found


def _hooks_everywhere(root: Path) -> list[Any]:
    ways = ((0, Stateful), (1, Looking), (2, Stateful), (2, Looking), (3, Stateful), (3, Looking))
    return [_hooks(root, stage, callback) for stage, callback in ways]


def test_hooks_run_in_the_order_of_ddp_and_may_change_everything(tmp_path: Path) -> None:
    ranks = on_ranks(_hooks_everywhere, 2, tmp_path)
    for results in ranks:
        for saved, events, found in results:
            assert events == [
                "module on_load_checkpoint",
                "callback load_state_dict",
                "callback on_fit_start 5",
                "module on_fit_start",
            ]
            assert torch.equal(found["numbers"], torch.arange(4.0))
            assert torch.equal(found["lower"], saved["blocks.0.lower.weight"])
            assert torch.equal(found["part"], saved["blocks.0.lower.weight"] * 2)
            assert found["weights"]["scale"].tolist() == [1.0, 2.0, 3.0]
            assert found["weights"]["head.weight"].eq(0.5).all()
            assert found["lr"] == 0.25
            assert found.get("early", found["weights"]["head.weight"]).eq(0.5).all()
    for ways in zip(*ranks, strict=True):  # at stage 1 one of the ranks has the state
        moments = [found["moment"] for _, _, found in ways if "moment" in found]
        assert moments
        assert all(moment.eq(7).all() for moment in moments)


class Metered(Model):
    """A metric's state, and an entry of its own in the state dict: both differ between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.mean.persistent(True)
        self.own = torch.zeros(2_000_000)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.mean.update(10.0 * self.global_rank + batch_idx)
        self.own += 1 + self.global_rank
        return super().training_step(batch, batch_idx)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().state_dict(*args, **kwargs), "own": self.own}


def _save_counts(root: Path) -> None:
    for stage, async_save in ((0, False), (1, True), (3, False), (3, True)):
        saver = ModelCheckpoint(
            root / f"{stage}-{async_save}", filename="{step}", every_n_train_steps=2, save_top_k=-1
        )
        options = {"async_save": async_save}
        run = trainer(root, stage, max_steps=4, callbacks=[saver], strategy_options=options)
        run.fit(Metered(), loader())


def test_what_differs_between_ranks_is_stored_as_rank_0_has_it(tmp_path: Path) -> None:
    on_ranks(_save_counts, 2, tmp_path)
    for folder in tmp_path.iterdir():
        with open_checkpoint(folder / "step=2.ckpt") as checkpoint:
            assert checkpoint.tensor("model", "own").eq(2).all()
            assert checkpoint.tensor("model", "mean.mean_value") == 1  # of 0 and 1, and not of 10
            assert checkpoint.tensor("model", "mean.weight") == 2


class Wider(Model):
    """Another layer than the checkpoint has."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.more = nn.Linear(3, 3)
        self.strict_loading = strict


class Narrower(Model):
    """Without the checkpoint's last layer."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        del self.scale
        self.scale = 1.0
        self.strict_loading = strict


def _strictness(root: Path) -> list[str]:
    L.seed_everything(1)
    run = trainer(root, 2, max_steps=2)
    source = Model()
    run.fit(source, loader())
    run.save_checkpoint(root / "a.ckpt")
    saved = whole_weights(source)
    for name in ("running_mean", "running_var"):
        dist.broadcast(saved[f"norm.{name}"], src=0)  # rank 0's buffers are the ones saved
    problems = []
    for stage in STAGES:
        for kind in (Wider, Narrower):
            model = kind(strict=False)
            before = whole_weights(model)
            trainer(root, stage).test(model, loader(8), str(root / "a.ckpt"), verbose=False)
            for key, value in whole_weights(model).items():
                assert torch.equal(value, saved.get(key, before[key])), key
            model = kind(strict=True)
            before = whole_weights(model)
            with pytest.raises(RuntimeError) as caught:
                trainer(root, stage).test(model, loader(8), str(root / "a.ckpt"), verbose=False)
            problems.append(str(caught.value))
            for key, value in whole_weights(model).items():
                assert torch.equal(value, before[key]), key
    return problems


def test_strict_loading_in_both_directions(tmp_path: Path) -> None:
    for problems in on_ranks(_strictness, 2, tmp_path):
        for missing, unexpected in zip(problems[::2], problems[1::2], strict=True):
            assert 'Missing key(s) in state_dict: "more.weight", "more.bias"' in missing
            assert 'Unexpected key(s) in state_dict: "scale"' in unexpected


class Hiding(Model):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["secret"] = Secret(3)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["secret"].value == 3


def _unsafe(root: Path, stage: int) -> str:
    path = str(root / f"{stage}.ckpt")
    run = trainer(root, stage, max_steps=1)
    run.fit(Hiding(), loader())
    _, texts = warned(run.save_checkpoint, path)
    told = any("stored as pickles: 'client_state/secret'" in text for text in texts)
    assert told == (dist.get_rank() == 0)
    trainer(root, stage, max_steps=2).fit(Hiding(), loader(), ckpt_path=path, weights_only=False)
    with pytest.raises(UnsafeObjectError) as caught:
        trainer(root, stage, max_steps=2).fit(Hiding(), loader(), ckpt_path=path)
    return str(caught.value)


def test_pickled_objects_need_weights_only_false(tmp_path: Path) -> None:
    for stage in (1, 3):
        for problem in on_ranks(_unsafe, 2, tmp_path, stage):
            assert "client_state/secret" in problem
            assert "weights_only=False" in problem


def _evaluations(root: Path, stage: int) -> Any:
    """Before, after and without fit; losses by `ckpt_path`."""
    L.seed_everything(2)
    model = Model()
    saver = ModelCheckpoint(
        dirpath=root / "checkpoints", monitor="val_loss", mode="max", save_top_k=-1, save_last=True
    )
    run = trainer(root, stage, max_epochs=3, callbacks=[saver])
    before = run.validate(model, loader(16, seed=5), verbose=False)
    run.fit(model, loader(), loader(16, seed=5))
    run.fit_loop.max_epochs = 4
    losses = {}
    for path in (None, "best", "last", saver.best_model_path, str(root / "checkpoints")):
        fresh = trainer(root, stage, callbacks=[saver])
        losses[str(path), "same"] = run.test(model, loader(16), path, verbose=False)
        losses[str(path), "other"] = fresh.test(
            model if path is None else Model(), loader(16), path, verbose=False
        )
    predicted = run.predict(model, loader(16), ckpt_path="last")
    run.fit(model, loader(), loader(16, seed=5), ckpt_path="last")
    return before, losses, torch.cat(predicted), whole_weights(model)


def _evaluations_everywhere(root: Path) -> list[Any]:
    return [_evaluations(root / f"{stage}", stage) for stage in (0, 2, 3)]


def test_validate_test_and_predict_around_fit(tmp_path: Path) -> None:
    for expected, *others in on_ranks(_evaluations_everywhere, 2, tmp_path, timeout=150):
        losses = list(expected[1].values())
        assert losses[2] != losses[4]  # best is not last
        assert [losses[0], losses[1], losses[5], losses[8], losses[9]] == [losses[4]] * 5
        assert losses[6] == losses[7] == losses[2] == losses[3]
        for other in others:
            assert other[0] == expected[0]
            assert list(other[1].values()) == losses
            torch.testing.assert_close(other[2], expected[2])
            for key, value in expected[3].items():
                torch.testing.assert_close(other[3][key], value)


class Keeping(Model):
    """Keeps what it is given, and works with it after the checkpoint is gone, as with its live weights."""

    kept: dict[str, Any] | None = None
    average: dict[str, Any] | None = None
    full: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.average or dict(self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average = checkpoint["average"]
        self.kept = {"head.weight": checkpoint["state_dict"]["head.weight"]}

    def on_train_start(self) -> None:
        if self.average is None:
            return
        with torch.no_grad():
            for name, value in self.state_dict().items():
                if value.is_floating_point():
                    self.average[name].mul_(0.5).add_(value, alpha=0.5)
                    assert torch.allclose(whole(self.average[name]), whole(value))


def _keep(root: Path, stage: int) -> tuple[Any, ...]:
    path = str(root / f"stage{stage}.ckpt")
    trainer_options: dict[str, Any] = {"limit_train_batches": 1, "max_epochs": 1}
    first = trainer(root, stage, **trainer_options)
    first.fit(Keeping(), loader())
    first.save_checkpoint(path)
    model = Keeping()
    second = trainer(root, stage, max_epochs=1)
    second.validate(model, loader(8), ckpt_path=path, verbose=False)
    saved = whole_weights(model)
    first.save_checkpoint(path)  # what was loaded is gone
    assert model.kept is not None
    kept = model.kept["head.weight"] + 0
    third = trainer(root, stage, max_epochs=2, limit_train_batches=1, callbacks=[RemoveIt(path)])
    third.fit(fitted := Keeping(), loader(), ckpt_path=path)
    third.save_checkpoint(path)  # averages that are kept are saved again
    second.validate(again := Keeping(), loader(8), ckpt_path=path, verbose=False)
    assert fitted.average is not None
    assert again.average is not None
    averages = {k: (whole(fitted.average[k]), again.average[k] + 0) for k in fitted.average}
    return saved["head.weight"], kept, averages


class RemoveIt(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.remove_checkpoint(self.path)
        trainer.strategy.barrier("removed")


def _keep_everywhere(root: Path) -> list[Any]:
    return [_keep(root, stage) for stage in (1, 3)]


def test_what_a_hook_keeps_outlives_the_checkpoint(tmp_path: Path) -> None:
    for results in on_ranks(_keep_everywhere, 2, tmp_path):
        for weight, kept, averages in results:
            assert torch.equal(kept, weight)
            for before, after in averages.values():
                assert torch.equal(before, after)


class Counting(Model):
    """Keeps one tensor."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["state_dict"]["scale"]


def _read_again(root: Path) -> list[str]:
    run = trainer(root, 2, max_steps=1)
    run.fit(Model(), loader())
    run.save_checkpoint(root / "a.ckpt")
    asked: list[str] = []
    ask = HandedOut._kept

    def telling(self: HandedOut, checkpoint: Any) -> Any:
        kept = ask(self, checkpoint)
        asked.extend(each.key for each in kept)
        return kept

    HandedOut._kept = telling  # type: ignore[method-assign]
    trainer(root, 2, max_steps=2).fit(Counting(), loader(), ckpt_path=str(root / "a.ckpt"))
    return asked


def test_what_nobody_keeps_is_not_read_again(tmp_path: Path) -> None:
    for asked in on_ranks(_read_again, 2, tmp_path):
        assert set(asked) == {"scale"}


def _keep_on_one_rank(root: Path) -> Any:
    """Rank 1 keeps what is damaged; both must hear of it."""
    run = trainer(root, 2, max_steps=1)
    run.fit(Model(), loader())
    run.save_checkpoint(root / "a.ckpt")
    read = HandedOut.read_kept

    def damaged(self: HandedOut, checkpoint: Any, progress: Any) -> None:
        if dist.get_rank() == 1:
            raise CorruptShardError("a.ckpt: damaged")
        read(self, checkpoint, progress)

    HandedOut.read_kept = damaged  # type: ignore[method-assign]
    with pytest.raises(CorruptShardError, match=r"rank 1: .*damaged"):
        trainer(root, 2, max_steps=2).fit(Counting(), loader(), ckpt_path=str(root / "a.ckpt"))


def test_no_rank_fails_alone_over_what_it_keeps(tmp_path: Path) -> None:
    on_ranks(_keep_on_one_rank, 2, tmp_path)


class Own(torch.optim.SGD):
    """Has a state of its own, which one rank cannot take in."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "own": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("not here")
        super().load_state_dict(state_dict)


class OwnOptimizer(Model):
    def configure_optimizers(self) -> Any:
        return Own(self.parameters(), 0.1)


def _refuse_own_state_on_one_rank(root: Path) -> Any:
    run = trainer(root, 2, max_steps=1)
    run.fit(OwnOptimizer(), loader())
    run.save_checkpoint(root / "a.ckpt")
    with pytest.raises(ZeroCkptError, match="rank 1: RuntimeError: not here") as caught:
        trainer(root, 2, max_steps=2).fit(OwnOptimizer(), loader(), ckpt_path=root / "a.ckpt")
    assert not isinstance(caught.value, SaveError)


def test_no_rank_fails_alone_over_an_optimizers_own_state(tmp_path: Path) -> None:
    on_ranks(_refuse_own_state_on_one_rank, 2, tmp_path)


def test_others_hear_from_a_rank_that_reads_what_hooks_have_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, torch.nn.Linear(2, 2), step=1)
    beats: list[None] = []
    with open_checkpoint(tmp_path) as checkpoint:
        kept = checkpoint.lazy("model", "weight")
        HandedOut([kept]).read_kept(checkpoint, lambda: beats.append(None))
    assert kept.is_read
    assert beats
