"""Each argument of a load does what it says, at every stage, and reads no file that it does not need."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler

import zero_ckpt
from tests.contract.models import STAGES, Net, adamw, opened, recording, shard, train, weights
from tests.told import told_once, warned
from tests.workers import run_ranks
from zero_ckpt import Checkpointer, load_checkpoint, save_checkpoint
from zero_ckpt.core.naming import innermost
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NothingSavedError,
    StateMismatchError,
    ZeroCkptError,
)

WORLD = 2


def _save_two_tags(directory: str, stage: int) -> list[dict[str, torch.Tensor]]:
    """Tags `old` and `new`, and the weights of each; `latest` names `new`."""
    model, optimizer = shard(stage)
    schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
    found = []
    with Checkpointer(model, optimizer, schedule) as checkpointer:
        for tag in ("old", "new"):
            train(model, optimizer)
            schedule.step()
            checkpointer.save_checkpoint(directory, tag, {"tag": tag})
            found.append(weights(model))
    return found


PARTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "all": ({}, {"optimizer", "scheduler"}),
    "module only": ({"load_module_only": True}, set()),
    "no optimizer": ({"load_optimizer_states": False}, {"scheduler"}),
    "no scheduler": ({"load_lr_scheduler_states": False}, {"optimizer"}),
}


def _load_parts(directory: str, stage: int) -> list[Any]:
    """What each way to load changed and opened, of the tag that is not the latest."""
    found = []
    for options, _ in PARTS.values():
        model, optimizer = shard(stage, seed=1)
        schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
        storage = recording()
        with Checkpointer(model, optimizer, schedule, storage=storage, rng=False) as checkpointer:
            path, client_state = checkpointer.load_checkpoint(directory, "old", **options)
        holder = getattr(optimizer, "optim", optimizer)
        changed = {
            name
            for name, value in {"optimizer": holder.state, "scheduler": schedule.last_epoch}.items()
            if value
        }
        folders = {os.path.basename(os.path.dirname(each.path)) for each in storage.log}
        state = [path, client_state, weights(model), optimizer.param_groups[0]["lr"]]
        found.append((*state, changed, opened(storage), folders))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_parts_of_a_checkpoint_load_alone_from_the_tag_that_was_asked_for(
    stage: int, tmp_path: Path
) -> None:
    saved = run_ranks(_save_two_tags, WORLD, str(tmp_path), stage)[0][0]
    for rank, by_part in enumerate(run_ranks(_load_parts, WORLD, str(tmp_path), stage)):
        for (name, (_, expected)), found in zip(PARTS.items(), by_part, strict=True):
            path, client_state, loaded, rate, changed, files, folders = found
            assert (path, client_state) == (str(tmp_path / "old"), {"tag": "old"}), name
            assert all(torch.equal(loaded[key], saved[key]) for key in saved), name
            assert changed == expected, name
            assert rate == (0.05 if "optimizer" in expected else 0.1), name
            assert folders == {"old"}, name
            assert files["manifest.json"] == 1, name
            assert files["state"] <= 1 + rank, name
            assert ("optim" in files) == ("optimizer" in expected), name
            assert 0 < files["model"] <= WORLD, name


# strict=False


class Other(nn.Module):
    """Has a part of `Net`, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fresh = nn.Linear(7, 5), nn.Linear(2, 2)


def test_what_does_not_match_is_in_the_report_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    save_checkpoint(tmp_path, model, step=1, client_state=[1])
    live = Other()
    before = live.fresh.weight.clone()
    with caplog.at_level(logging.WARNING, "zero_ckpt"):
        result = load_checkpoint(tmp_path, live, load_module_strict=False)
    path, client_state = result
    assert (path, client_state) == (result.path, result.client_state)
    assert client_state == [1]
    assert result.report.missing == ("fresh.weight", "fresh.bias")
    assert set(result.report.unexpected) == {
        *(f"{part}.{kind}" for part in ("base", "head") for kind in ("weight", "bias")),
        "steps",
    }
    assert torch.equal(live.hidden.weight, model.hidden.weight)
    assert torch.equal(live.fresh.weight, before)
    missing, unexpected = (record.getMessage() for record in caplog.records)
    assert "not in the checkpoint, kept as it was: 'fresh.weight', 'fresh.bias'" in missing
    assert "not in the model, not loaded: 'steps', 'base.weight'" in unexpected
    for twin in (copy.copy(result), pickle.loads(pickle.dumps(result))):
        assert twin == result
        assert twin.report == result.report


def test_a_strict_load_reports_nothing_and_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, Net(), step=1)
    result = load_checkpoint(tmp_path, Net(1))
    assert (result.report.missing, result.report.unexpected) == ((), ())
    assert not caplog.records


# custom_load_fn


def _load_custom(directory: str, stage: int) -> tuple[Any, ...]:
    model, optimizer = shard(stage, seed=1)
    seen: list[Any] = []

    def load(src: dict[str, Any], dst: nn.Module) -> None:
        seen.extend([sorted(src), dst is innermost(model), src["head.weight"].is_read])
        dst.get_parameter("hidden.weight").data.copy_(src["hidden.weight"])
        dst.load_state_dict({key: t for key, t in src.items() if "head" in key}, strict=False)

    before = weights(model)
    with Checkpointer(model, optimizer, rng=False) as checkpointer:
        checkpointer.load_checkpoint(
            directory, "new", load_lr_scheduler_states=False, custom_load_fn=load
        )
    moments = getattr(optimizer, "optim", optimizer).state
    return seen, before, weights(model), bool(moments)


@pytest.mark.parametrize("stage", STAGES)
def test_a_function_of_the_users_gets_lazy_weights_and_the_module(
    stage: int, tmp_path: Path
) -> None:
    saved = run_ranks(_save_two_tags, WORLD, str(tmp_path), stage)[0][1]
    for seen, before, after, moments in run_ranks(_load_custom, WORLD, str(tmp_path), stage):
        assert seen == [sorted(saved), True, False]
        assert moments
        for key, value in after.items():
            loaded = key.startswith("head") or key == "hidden.weight"
            assert torch.equal(value, saved[key] if loaded else before[key]), key


def _fail_on_one_rank(directory: str) -> str:
    model, optimizer = shard(3)

    def load(src: dict[str, Any], dst: nn.Module) -> None:
        if dist.get_rank() == 1:
            raise KeyError("not my weights")

    with Checkpointer(model, optimizer) as checkpointer:
        checkpointer.save_checkpoint(directory, "t")
        with pytest.raises(ZeroCkptError) as caught:
            checkpointer.load_checkpoint(directory, custom_load_fn=load)
    return str(caught.value)


def test_what_the_function_raises_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    told = run_ranks(_fail_on_one_rank, WORLD, str(tmp_path))
    assert told[0] == told[1]
    assert "rank 1: KeyError: 'not my weights'" in told[0]
    assert "LIVE TENSORS MAY BE OVERWRITTEN IN PART" in told[0]


def test_its_error_is_told_as_sentences(tmp_path: Path) -> None:
    """What `load_state_dict` raises ends in a line break and a full stop."""
    save_checkpoint(tmp_path, Net(0), step=1)

    def load(src: Any, dst: torch.nn.Module) -> None:
        dst.load_state_dict({})

    with pytest.raises(
        ZeroCkptError, match=r"Missing key\(s\).*[^. ]\. LIVE TENSORS MAY"
    ) as caught:
        load_checkpoint(tmp_path, Net(1), custom_load_fn=load)
    assert ". ." not in str(caught.value)


def test_the_function_is_called_for_each_model_with_its_own_names(tmp_path: Path) -> None:
    nets = {"a": Net(0), "b": Net(1)}
    save_checkpoint(tmp_path, nets, step=1)
    live = {"a": Net(2), "b": Net(3)}
    load_checkpoint(tmp_path, live, custom_load_fn=lambda src, dst: dst.load_state_dict(src))
    for name, net in live.items():
        for key, value in net.state_dict().items():
            assert torch.equal(value, nets[name].state_dict()[key])


def test_the_function_is_not_called_when_a_weight_is_damaged(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Net(), step=1)
    (file,) = (tmp_path / "global_step1").glob("model-*")
    data = bytearray(file.read_bytes())
    data[4096 + 8] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(tmp_path, Net(), custom_load_fn=lambda src, dst: pytest.fail("called"))


# Nothing to load


def _load_nothing(root: str) -> list[Any]:
    model, optimizer = shard(3)
    before = weights(model)
    found: list[Any] = []
    for name, tag in [("gone", None), ("empty", None), ("empty", "other")]:
        result, texts = warned(load_checkpoint, f"{root}/{name}", model, optimizer, tag=tag)
        found.append((*result, texts))
        with Checkpointer(model, optimizer) as checkpointer, pytest.raises(NothingSavedError):
            checkpointer.load_checkpoint(f"{root}/{name}", tag)
        with pytest.raises(CheckpointNotFoundError):
            load_checkpoint(f"{root}/{name}", model, optimizer, tag=tag, missing_ok=False)
    with pytest.raises(CheckpointNotFoundError) as misspelled:
        load_checkpoint(f"{root}/full", model, optimizer, tag="other")
    found.append(str(misspelled.value))
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    return found


def test_where_nothing_was_saved_the_functions_of_deepspeed_return_nothing_and_say_so(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    for step in (1, 2, 3, 10, 20):
        save_checkpoint(tmp_path / "full", Net(), step=step)
    by_rank = run_ranks(_load_nothing, WORLD, str(tmp_path))
    *missing, misspelled = zip(*by_rank, strict=True)
    for found, place in zip(missing, ("gone", "empty", "empty/other"), strict=True):
        assert all(result[:2] == (None, None) for result in found)
        (text,) = told_once([texts for *_, texts in found])
        assert text.startswith("NOTHING WAS LOADED")
        assert str(tmp_path / place) in text
    tags = ", ".join(f"'global_step{step}'" for step in (2, 3, 10, 20))
    text = (
        f"{tmp_path}/full/other: no such checkpoint; {tmp_path}/full has ... {tags}. Give one of these tags, or none "
        "for the newest."
    )
    assert misspelled == (text,) * WORLD


def _damage(directory: Path, how: str) -> str | None:
    """The tag to ask for."""
    folder = directory / "t"
    if how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "latest without its tag":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    elif how == "cut":
        (file,) = folder.glob("model-*")
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "a file":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        folder.write_text("")
    return "t" if how in ("a file", "no manifest") else None


@pytest.mark.parametrize("how", ["no manifest", "latest without its tag", "cut", "a file"])
def test_damage_is_never_taken_for_nothing(how: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Net(), tag="t", step=1)
    tag = _damage(tmp_path, how)
    with pytest.raises(ZeroCkptError) as caught:
        load_checkpoint(tmp_path, Net(), tag=tag)
    assert not isinstance(caught.value, NothingSavedError)


def test_a_first_save_that_never_ended_is_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Net(), tag="t", step=1, save_latest=False)
    (tmp_path / "t" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="no committed checkpoint here"):
        assert load_checkpoint(tmp_path, Net()) == (None, None)


# Schedulers


@pytest.mark.parametrize("where", ["job", "checkpoint"])
def test_a_scheduler_on_one_side_is_a_warning_that_says_which(where: str, tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer)
    schedule.step()
    has = schedule if where == "checkpoint" else None
    save_checkpoint(tmp_path, model, optimizer, has, step=1)
    live = Net(1)
    again = adamw(live)
    fresh = None if has else lr_scheduler.StepLR(again, 1)
    with pytest.warns(UserWarning, match="the LR scheduler") as caught:
        load_checkpoint(tmp_path, live, again, fresh)
    (message,) = (str(warning.message) for warning in caught)
    expected = "begins its schedule anew" if fresh else "that the job has not"
    assert expected in message
    assert torch.equal(live.head.weight, model.head.weight)
    assert again.state
    load_checkpoint(tmp_path, live, again, fresh, load_lr_scheduler_states=False)


def test_of_several_schedulers_the_names_are_said(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    saved = {name: lr_scheduler.StepLR(optimizer, 1) for name in ("both", "old")}
    live = {name: lr_scheduler.StepLR(optimizer, 1) for name in ("both", "new")}
    optimizer.step()
    saved["both"].step()
    save_checkpoint(tmp_path, model, optimizer, saved, step=1)
    with pytest.warns(UserWarning, match="the LR schedulers") as caught:
        load_checkpoint(tmp_path, model, optimizer, live)
    new, old = (str(warning.message) for warning in caught)
    assert "no state for the LR schedulers 'new' of the job" in new
    assert "state of the LR schedulers 'old' that the job has not" in old
    assert live["both"].last_epoch == 1
    assert live["new"].last_epoch == 0


# Hyperparameters


def _options(optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def _save_rates(directory: str, stage: int) -> None:
    model, optimizer = shard(stage, lr=0.1)
    train(model, optimizer)
    save_checkpoint(directory, model, optimizer, step=1)


def _load_rates(directory: str, stage: int) -> list[Any]:
    found = []
    for override in (False, True):
        model, optimizer = shard(stage, seed=1, lr=0.4)
        with Checkpointer(model, optimizer, rng=False) as checkpointer:
            checkpointer.load_checkpoint(directory, override_hyperparameters=override)
        holder = getattr(optimizer, "optim", optimizer)
        found.append([_options(optimizer), _options(holder), len(holder.state) > 0])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_hyperparameters_are_the_checkpoints_or_the_new_runs_group_by_group(
    stage: int, tmp_path: Path
) -> None:
    run_ranks(_save_rates, WORLD, str(tmp_path), (stage + 1) % 4)
    for theirs, own in run_ranks(_load_rates, WORLD, str(tmp_path), stage):
        assert theirs == [[(0.1, 0.1), (0.05, 0)]] * 2 + [True]
        assert own == [[(0.4, 0.1), (0.2, 0)]] * 2 + [True]


def test_groups_that_were_regrouped_keep_their_own_options_where_that_was_asked_for(
    tmp_path: Path,
) -> None:
    model = Net()
    save_checkpoint(tmp_path, model, adamw(model), step=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    joined = torch.optim.AdamW(parameters, lr=0.7)
    with pytest.raises(StateMismatchError, match="override_hyperparameters=True"):
        load_checkpoint(tmp_path, model, joined)
    load_checkpoint(tmp_path, model, joined, override_hyperparameters=True)
    assert joined.param_groups[0]["lr"] == 0.7


def _schedule(kind: str, optimizer: torch.optim.Optimizer) -> Any:
    linear = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if kind == "lambda":
        return linear
    constant = lr_scheduler.ConstantLR(optimizer, 1.0, 1)
    return lr_scheduler.SequentialLR(optimizer, [linear, constant], [100])


@pytest.mark.parametrize("kind", ["lambda", "sequential"])
def test_a_schedule_goes_on_at_its_place_from_the_new_rates(kind: str, tmp_path: Path) -> None:
    rates = {}
    for lr in (0.1, 0.4):
        model = Net()
        optimizer = adamw(model, lr)
        schedule = _schedule(kind, optimizer)
        if lr == 0.4:
            load_checkpoint(tmp_path, model, optimizer, schedule, override_hyperparameters=True)
            assert optimizer.param_groups[1]["lr"] == 0.2
        else:
            train(model, optimizer)
            schedule.step()
            save_checkpoint(tmp_path, model, optimizer, schedule, step=1)
        schedule.step()
        rates[lr] = [group["lr"] for group in optimizer.param_groups]
    assert rates[0.1] == pytest.approx([0.1 / 3, 0.05 / 3])
    assert rates[0.4] == pytest.approx([0.4 / 3, 0.2 / 3])


def test_the_functions_take_every_argument_of_the_methods() -> None:
    for name in ("save_checkpoint", "load_checkpoint"):
        method = inspect.signature(getattr(Checkpointer, name)).parameters
        function = inspect.signature(getattr(zero_ckpt, name)).parameters
        assert set(method) - {"self"} <= set(function)
