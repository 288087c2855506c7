"""What a checkpoint holds of optimizers and schedulers, whatever their state, groups and options. In one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.small import (
    NAMES,
    Factored,
    Meter,
    adam_over,
    one_step,
    same,
    two_layers,
)
from tests.told import warned
from zero_ckpt import (
    Checkpointer,
    load_checkpoint,
    save_checkpoint,
)
from zero_ckpt.core import optimizers
from zero_ckpt.core.optimizer_state import StateBuilder
from zero_ckpt.errors import StateMismatchError, UnsafeObjectError

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.1), foreach=False),
    "adam bf16 state": lambda p: torch.optim.Adam(p, 0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.1),
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "factored": lambda p: Factored(p, odd=("x", {1: None})),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("warm", [False, True], ids=["into nothing", "into state"])
def test_the_state_of_every_optimizer_comes_back_exactly(
    name: str, warm: bool, tmp_path: Path
) -> None:
    model = two_layers()
    optimizer = OPTIMIZERS[name](model.parameters())
    one_step(model, optimizer)
    if "bf16" in name:
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].bfloat16()
    save_checkpoint(tmp_path, model, optimizer, step=1)
    other = two_layers(1)
    again = OPTIMIZERS[name](other.parameters())
    if warm:
        one_step(other, again)
    load_checkpoint(tmp_path, other, again)
    assert same(again.state_dict(), optimizer.state_dict())
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    if "bf16" not in name:
        one_step(model, optimizer)
        one_step(other, again)
        assert same(dict(other.state_dict()), dict(model.state_dict()))


class LookingAhead(torch.optim.SGD):
    """Counts its steps in an attribute, which its state dict has beside torch's entries."""

    steps = 0
    slow: torch.Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        self.slow = self.param_groups[0]["params"][0].detach().clone()
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps, "slow": self.slow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        self.steps, self.slow = state_dict["steps"], state_dict["slow"]


def test_what_an_optimizers_own_state_dict_adds_comes_back(tmp_path: Path) -> None:
    model, other = two_layers(), two_layers(1)
    optimizer = LookingAhead(model.parameters(), lr=0.1, momentum=0.9)
    again = LookingAhead(other.parameters(), lr=0.3, momentum=0.9)
    one_step(model, optimizer)
    state, groups = again.state, again.param_groups
    Checkpointer(model, optimizer).save_checkpoint(tmp_path)
    Checkpointer(other, again).load_checkpoint(tmp_path)
    assert same(again.state_dict(), optimizer.state_dict())
    assert again.state is state
    assert again.param_groups is groups
    assert (again.steps, again.param_groups[0]["lr"]) == (1, 0.1)


class Around(torch.optim.Optimizer):
    """Wraps another one: state and groups are those of that, and its own state dict adds a counter."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.steps = inner, 0
        super().__init__(inner.param_groups, {})
        self.state = inner.state

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict.pop("steps")
        self.inner.load_state_dict(state_dict)
        self.state, self.param_groups = self.inner.state, self.inner.param_groups


def test_a_wrapper_with_own_state_and_the_optimizer_inside_stay_one(tmp_path: Path) -> None:
    model, other = two_layers(), two_layers(1)
    optimizer = Around(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    again = Around(torch.optim.SGD(other.parameters(), lr=0.3, momentum=0.9))
    one_step(model, optimizer)
    Checkpointer(model, optimizer).save_checkpoint(tmp_path)
    Checkpointer(other, again).load_checkpoint(tmp_path)
    assert again.inner.state is again.state
    assert again.inner.param_groups[0] is again.param_groups[0]
    assert same(again.inner.state_dict(), optimizer.inner.state_dict())
    one_step(model, optimizer)
    one_step(other, again)
    assert same(again.state_dict(), optimizer.state_dict())


def test_state_that_needs_a_pickle_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = Factored(model.parameters())
    one_step(model, optimizer)
    optimizer.state[model[0].weight]["secret"] = Path
    optimizer.state[model[1].bias]["secret"] = [complex, torch.ones(1)]
    with pytest.warns(UserWarning, match=r"pickles: '0.weight/secret' \(builtins.type\), '1.bias"):
        save_checkpoint(tmp_path, model, optimizer, step=1)
    other = two_layers(1)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    again = Factored(other.parameters())
    with pytest.raises(
        UnsafeObjectError, match=r"state '0.weight/secret' is a pickled builtins\.type"
    ):
        load_checkpoint(tmp_path, other, again)
    assert same(dict(other.state_dict()), before)
    assert not again.state
    load_checkpoint(tmp_path, other, again, weights_only=False)
    assert again.state[other[0].weight]["secret"] is Path
    assert same(again.state[other[1].bias]["secret"], [complex, torch.ones(1)])


@pytest.mark.parametrize("name", [0, "a#int", "a#entry/0", "b#json"])
def test_a_name_in_an_optimizers_state_that_would_change_is_refused(
    name: Any, tmp_path: Path
) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.bias][name] = torch.ones(1)
    with pytest.raises(StateMismatchError, match="keeps state of 'bias' under"):
        save_checkpoint(tmp_path, model, optimizer, tag="t")
    assert list(tmp_path.iterdir()) == []


def test_state_of_no_parameter_is_told_of_by_the_save(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["global"] = {"evaluations": 3}
    with pytest.warns(UserWarning, match=r"SGD keeps for no parameter \('global'\) is not saved"):
        save_checkpoint(tmp_path, model, optimizer, tag="t")


@pytest.mark.parametrize("keep", [False, True])
def test_steps_lie_where_the_options_that_are_loaded_want_them(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused optimizer on an accelerator reads them there; others on the host."""
    model = two_layers()
    fused = torch.optim.Adam(model.parameters(), fused=True)
    one_step(model, fused)
    save_checkpoint(tmp_path, model, fused, tag="t")
    on_host: list[bool] = []

    class Noted(StateBuilder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            on_host.append(self._cpu_step)

    monkeypatch.setattr(optimizers, "StateBuilder", Noted)
    plain = torch.optim.Adam(model.parameters())
    load_checkpoint(tmp_path, model, plain, override_hyperparameters=keep)
    assert plain.param_groups[0]["fused"] is (None if keep else True)
    assert set(on_host) == {keep}


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        (torch.optim.Adam, {"amsgrad": True}, ["max_exp_avg_sq"]),
        (torch.optim.AdamW, {"amsgrad": True}, ["max_exp_avg_sq"]),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, ["grad_avg", "momentum_buffer"]),
        (torch.optim.SGD, {"momentum": 0.9}, []),
    ],
)
def test_state_that_only_new_options_take_begins_at_zero(
    kind: Any, options: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    model = two_layers()
    optimizer = kind(model.parameters(), lr=0.1)
    one_step(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, tag="t")
    changed = kind(model.parameters(), lr=0.1, **options)
    _, texts = warned(
        load_checkpoint, tmp_path, model, changed, tag="t", override_hyperparameters=True
    )
    assert [name for name in names if all(f"'{name}'" in text for text in texts)] == names
    assert len(texts) == bool(names)
    for parameter, saved in optimizer.state.items():
        state = changed.state[parameter]
        assert all(torch.equal(state[name], saved[name]) for name in state.keys() & saved.keys())
        assert all(torch.equal(state[name], torch.zeros_like(parameter)) for name in names)
    one_step(model, changed)


@pytest.mark.parametrize(
    "groups", [[NAMES[::-1]], [NAMES[:2], NAMES[2:]], [NAMES[4:], NAMES[:3], [NAMES[3]]]]
)
def test_parameters_are_matched_by_name_in_any_order_and_grouping(
    groups: list[list[str]], tmp_path: Path
) -> None:
    model = two_layers()
    optimizer = adam_over(model, [NAMES])
    one_step(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, step=1)
    other = two_layers(1)
    again = adam_over(other, groups)
    load_checkpoint(tmp_path, other, again)
    mine, theirs = dict(other.named_parameters()), dict(model.named_parameters())
    assert len(again.state) == 4
    for name in NAMES[:4]:
        assert same(again.state[mine[name]], optimizer.state[theirs[name]])


def test_groups_that_cannot_be_joined_are_named(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = adam_over(model, [NAMES[:2], NAMES[2:]])
    optimizer.param_groups[1]["lr"] = 0.5
    save_checkpoint(tmp_path, model, optimizer, step=1)
    with pytest.raises(StateMismatchError, match=r"group 0 joins parameters of the saved groups"):
        load_checkpoint(tmp_path, model, adam_over(model, [NAMES]))


def test_options_of_groups_come_back(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = adam_over(model, [NAMES[:2], NAMES[2:]])
    optimizer.param_groups[0] |= {"lr": 0.7, "betas": (0.5, 0.6), "name": "first"}
    save_checkpoint(tmp_path, model, optimizer, step=1)
    again = adam_over(model, [NAMES[:2], NAMES[2:]])
    load_checkpoint(tmp_path, model, again)
    assert again.param_groups == optimizer.param_groups


@pytest.mark.parametrize("form", ["dict", "list"])
def test_several_models_optimizers_and_schedulers(form: str, tmp_path: Path) -> None:
    def make(seed: int) -> tuple[Any, Any, Any]:
        models = {"gen": two_layers(seed), "disc": two_layers(seed + 1)}
        optimizers: dict[str, torch.optim.Optimizer] = {
            "g": torch.optim.Adam(models["gen"].parameters()),
            "d": torch.optim.SGD(models["disc"].parameters(), 0.1, momentum=0.9),
            "both": torch.optim.Adagrad(
                [models["gen"][0].weight, models["disc"][0].weight], lr=0.1
            ),
        }
        schedulers = {"g": lr_scheduler.StepLR(optimizers["g"], 1), "m": Meter(seed)}
        parts = (models, optimizers, schedulers)
        return parts if form == "dict" else tuple(list(part.values()) for part in parts)

    saved, loaded = make(0), make(5)
    models, optimizers, schedulers = (list(p.values() if form == "dict" else p) for p in saved)
    for model in models:
        one_step(model, *optimizers)
    schedulers[0].step()
    Checkpointer(*saved).save_checkpoint(tmp_path, "t")
    Checkpointer(*loaded).load_checkpoint(tmp_path, "t")
    for mine, theirs in zip(saved, loaded, strict=True):
        a, b = (list(p.values() if form == "dict" else p) for p in (mine, theirs))
        assert all(
            same(dict(x.state_dict()), dict(y.state_dict())) for x, y in zip(a, b, strict=True)
        )
    with pytest.raises(StateMismatchError, match="has other optimizers than the job: "):
        Checkpointer(loaded[0], optimizers[0]).load_checkpoint(tmp_path, "t")


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adagrad])
def test_another_optimizer_class_is_refused(other: Any, tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters())
    one_step(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, step=1)
    with pytest.raises(
        StateMismatchError, match=rf"was Adam when it was saved and is {other.__name__}"
    ):
        load_checkpoint(tmp_path, model, other(model.parameters(), lr=0.1))
    load_checkpoint(tmp_path, model, other(model.parameters(), lr=0.1), load_optimizer_states=False)


def test_an_optimizer_with_other_parameters_is_refused(tmp_path: Path) -> None:
    model = two_layers()
    save_checkpoint(tmp_path, model, adam_over(model, [NAMES]), step=1)
    with pytest.raises(StateMismatchError, match=r"only in the checkpoint: '2\.bias'"):
        load_checkpoint(tmp_path, model, adam_over(model, [NAMES[:5]]))


def test_module_only_loads_touch_nothing_else(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters())
    one_step(model, optimizer)
    meter = Meter(1)
    checkpointer = Checkpointer(model, optimizer, meter)
    checkpointer.save_checkpoint(tmp_path, "t", {"x": 1})
    other, again, new = two_layers(1), None, Meter(2)
    again = torch.optim.Adam(other.parameters())
    seeds = torch.get_rng_state()
    with Checkpointer(other, again, new) as fresh:
        _, client_state = fresh.load_checkpoint(tmp_path, load_module_only=True)
        assert fresh.global_step == 0
    assert client_state == {"x": 1}
    assert not again.state
    assert new.value == 2
    assert torch.equal(torch.get_rng_state(), seeds)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
