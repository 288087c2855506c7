"""Checkpoints of another model or optimizer: all that does not fit is listed, on every rank, and nothing is loaded."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.faults.jobs import TIMEOUT, Job, Raised, raised
from tests.told import warned
from tests.workers import run_ranks
from zero_ckpt import Checkpointer
from zero_ckpt.errors import ZeroCkptError

WORLD = 2
Model = Callable[[], nn.Module]


class Parts(nn.Module):
    """A model that is made of named layers."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def saved() -> nn.Module:
    return Parts(a=nn.Linear(4, 6), b=nn.Linear(6, 2), c=nn.Linear(3, 3))


def bigger() -> nn.Module:
    layers = dict(saved().named_children())
    return Parts(**layers, d=nn.Linear(2, 2), e=nn.BatchNorm1d(3))


def smaller() -> nn.Module:
    return Parts(a=nn.Linear(4, 6))


def other_shapes() -> nn.Module:
    return Parts(a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(3, 3))


def all_wrong() -> nn.Module:
    return Parts(a=nn.Linear(4, 6), b=nn.Linear(8, 2), d=nn.Linear(2, 2))


def wrong_on_rank_1() -> nn.Module:
    return other_shapes() if dist.get_rank() == 1 else saved()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


def job(model: nn.Module, optimizer: Any = adam, scheduler: Any = None) -> Job:
    """A sharded job, after one step, on any model and with any optimizer."""
    fully_shard(model)
    made = optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first = made[0] if isinstance(made, list) else made
    if first is not None:
        first.step()
    schedulers = scheduler(first) if scheduler else None
    checkpointer = Checkpointer(model, made, schedulers, timeout=TIMEOUT)
    return Job(model, first, schedulers, checkpointer)


def save_one(directory: str) -> None:
    torch.manual_seed(1)
    job(saved()).checkpointer.save_checkpoint(directory, "tag")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mismatch")
    run_ranks(save_one, WORLD, str(directory))
    return directory


def refused(
    directory: str, model: Model, optimizer: Any = adam, scheduler: Any = None, **options: Any
) -> Raised:
    """The error of a load into other objects, whose state must stay as it was."""
    live = job(model(), optimizer, scheduler)
    before = _bits(live)
    error = raised(live.checkpointer.load_checkpoint, directory, **options)
    assert _bits(live) == before
    return error


def _bits(live: Job) -> list[Any]:
    states: list[Any] = [live.model.state_dict()]
    states += [optimizer.state_dict() for optimizer in live.checkpointer.optimizers.values()]
    states += [scheduler.state_dict() for scheduler in live.checkpointer.lr_schedulers.values()]
    return [_plain(state) for state in states]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return getattr(value, "_local_tensor", value).tolist()
    return value


def refuse_models(directory: str) -> list[Raised]:
    models = [bigger, smaller, other_shapes, all_wrong, wrong_on_rank_1]
    errors = [refused(directory, model) for model in models]
    errors.append(refused(directory, other_shapes, load_module_strict=False))
    errors.append(refused(directory, bigger, load_module_only=True))
    return errors


def test_what_does_not_fit_the_model_is_listed_in_full_and_nothing_is_loaded(
    checkpoint: Path,
) -> None:
    by_rank = run_ranks(refuse_models, WORLD, str(checkpoint))
    assert by_rank[0] == by_rank[1]
    assert {error.kind for error in by_rank[0]} == {"StateMismatchError"}
    missing, unexpected, shapes, everything, one_rank, loose, only = (
        error.text for error in by_rank[0]
    )
    start = f"{checkpoint}/tag does not fit the model. "
    new = ", ".join(
        f"'{name}'"
        for name in [
            *("d.weight", "d.bias", "e.weight", "e.bias"),
            *("e.running_mean", "e.running_var", "e.num_batches_tracked"),
        ]
    )
    assert missing == (
        f"{start}Missing in the checkpoint: {new}. Nothing was loaded. "
        "To load what matches, turn strict loading off."
    )
    assert only == missing
    assert unexpected == (
        f"{start}In the checkpoint but not in the model: 'b.weight', 'b.bias', 'c.weight', 'c.bias'. "
        "Nothing was loaded. To load what matches, turn strict loading off."
    )
    listed = (
        "Other shapes: 'a.weight': [6, 4] in the checkpoint, [5, 4] in the model; "
        "'a.bias': [6] in the checkpoint, [5] in the model; "
        "'b.weight': [2, 6] in the checkpoint, [2, 5] in the model"
    )
    remedy = "Build it with the checkpoint's sizes, or leave these tensors out with custom_load_fn."
    assert shapes == f"{start}{listed}. Nothing was loaded. {remedy}"
    assert loose == shapes
    assert one_rank == f"rank 1: {shapes}"
    assert everything == (
        f"{start}Other shapes: 'b.weight': [2, 6] in the checkpoint, [2, 8] in the model. "
        "Missing in the checkpoint: 'd.weight', 'd.bias'. "
        f"In the checkpoint but not in the model: 'c.weight', 'c.bias'. Nothing was loaded. {remedy}"
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def part(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.get_submodule("a").parameters(), lr=0.1)


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [adam(model), adam(model)]


def none(model: nn.Module) -> None:
    return None


def refuse_optimizers(directory: str) -> list[Raised]:
    return [
        refused(directory, saved, sgd),
        refused(directory, saved, part),
        refused(directory, saved, two),
        refused(directory, saved, none),
    ]


def test_what_does_not_fit_the_optimizer_is_told_and_nothing_is_loaded(checkpoint: Path) -> None:
    by_rank = run_ranks(refuse_optimizers, WORLD, str(checkpoint))
    assert by_rank[0] == by_rank[1]
    assert {error.kind for error in by_rank[0]} == {"StateMismatchError"}
    other_class, other_parameters, more, fewer = (error.text for error in by_rank[0])
    assert (
        f"{checkpoint}/tag: the optimizer was Adam when it was saved and is SGD now" in other_class
    )
    assert "No optimizer was changed. Use the same class, or load with load_optimizer_states=" in (
        other_class
    )
    assert "the optimizer has other parameters than when it was saved: only in" in other_parameters
    assert "'b.bias', 'b.weight', 'c.bias', 'c.weight'. No optimizer was changed" in (
        other_parameters
    )
    others = f"{checkpoint}/tag has other optimizers than the job: one there"
    assert f"{others}, '0', '1' here. Nothing was loaded." in more
    assert f"{others}, none here. Nothing was loaded." in fewer
    for text in (more, fewer):
        assert "Nothing was loaded" in text


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        [{"params": list(model.get_submodule(k).parameters()), "lr": lr} for k, lr in RATES.items()]
    )


RATES = {"a": 0.1, "b": 0.01, "c": 0.1}


def refuse_groups(directory: str) -> Raised:
    """The groups are joined in which learning rates differed."""
    job(saved(), grouped).checkpointer.save_checkpoint(directory, "tag")
    return refused(directory, saved, adam)


def test_groups_that_join_parameters_with_other_options_are_refused(tmp_path: Path) -> None:
    errors = run_ranks(refuse_groups, WORLD, str(tmp_path))
    assert errors[0] == errors[1]
    assert errors[0].kind == "StateMismatchError"
    assert (
        "parameter group 0 joins parameters of the saved groups [0, 1, 2], whose options differ"
        in (errors[0].text)
    )
    assert "No optimizer was changed" in errors[0].text


class Fussy(nn.Linear):
    """Refuses the extra state of other ranks."""

    def get_extra_state(self) -> dict[str, int]:
        return {"rank": 0}

    def set_extra_state(self, state: dict[str, int]) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("not my state")


def refuse_extra_state(directory: str) -> tuple[Raised, str]:
    checkpointer = Checkpointer(Fussy(2, 2), timeout=TIMEOUT)
    checkpointer.save_checkpoint(directory, "tag")
    error = raised(checkpointer.load_checkpoint, directory)
    return error, checkpointer.save_checkpoint(directory, "next").path


def test_a_module_that_refuses_its_state_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    results = run_ranks(refuse_extra_state, WORLD, str(tmp_path))
    assert results[0] == results[1]
    error, path = results[0]
    assert error.kind == "ZeroCkptError"
    assert error.text == (
        "rank 1: RuntimeError: not my state. LIVE TENSORS MAY BE OVERWRITTEN IN PART: load again, or load another "
        "checkpoint, before you train on."
    )
    assert path == f"{tmp_path}/next"


def load_unsafe(directory: str) -> tuple[Raised, Raised, Any]:
    made = job(saved())
    state = {"args": Path, "n": 1}
    warned(made.checkpointer.save_checkpoint, directory, "tag", client_state=state)
    before = _bits(made)
    unsafe = raised(made.checkpointer.load_checkpoint, directory)
    missing = raised(made.checkpointer.load_checkpoint, directory, tag="other")
    assert _bits(made) == before
    _, client_state = made.checkpointer.load_checkpoint(directory, weights_only=False)
    return unsafe, missing, client_state


def test_a_pickle_is_opened_only_when_that_was_asked_for(tmp_path: Path) -> None:
    results = run_ranks(load_unsafe, WORLD, str(tmp_path))
    assert results[0] == results[1]
    unsafe, missing, client_state = results[0]
    assert unsafe.kind == "UnsafeObjectError"
    assert "'client_state/args' is a pickled builtins.type; opening it can run code" in unsafe.text
    assert "weights_only=False" in unsafe.text
    assert missing.kind == "CheckpointNotFoundError"
    assert missing.text == (
        f"{tmp_path}/other: no such checkpoint; {tmp_path} has 'tag'. Give one of these tags, or none for the newest."
    )
    assert client_state == {"args": Path, "n": 1}


def shown(directory: str) -> list[str]:
    """Tracebacks of a load that does not fit on any rank, on rank 1 alone, and of one whose tag is nowhere."""
    job(saved()).checkpointer.save_checkpoint(directory, "tag")
    texts = []
    for make, tag in ((other_shapes, "tag"), (wrong_on_rank_1, "tag"), (saved, "nowhere")):
        try:
            Checkpointer(make()).load_checkpoint(directory, tag, load_module_only=True)
        except ZeroCkptError as error:
            texts.append("".join(traceback.format_exception(error)))
    return texts


def test_a_traceback_tells_a_problem_once(tmp_path: Path) -> None:
    results = run_ranks(shown, WORLD, str(tmp_path))
    chained = "direct cause of the following"
    for rank, (everywhere, on_rank_1, nowhere) in enumerate(results):
        for text in (everywhere, nowhere):
            assert "During handling" not in text
            assert chained not in text
            assert text.count("Traceback (most recent call last)") == 1
        assert "in plan_model" in everywhere, "where this rank has found it"
        assert "in meet" not in everywhere, "and not how the ranks have told each other"
        assert (chained in on_rank_1) == (rank == 1), "its own problem, without and with the rank"
