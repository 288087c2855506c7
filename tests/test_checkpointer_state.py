"""What a checkpoint holds of models and optimizers, down to dtypes and odd values. In one process."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.told import warned
from zero_ckpt import (
    Checkpointer,
    export_fp32,
    get_fp32_state_dict_from_zero_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from zero_ckpt.cli.program import main
from zero_ckpt.core import optimizers
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.core.dtensors import DTYPE_NAMES
from zero_ckpt.core.optimizer_state import StateBuilder
from zero_ckpt.core.shard_reader import ShardReader
from zero_ckpt.errors import ConfigurationError, StateMismatchError, UnsafeObjectError


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


class Holder(nn.Module):
    """Holds the given tensors: floating point ones as parameters, others as buffers."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (*shape, size), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


SHAPES = [(), (0,), (3, 0, 2), (1,), (5, 3), (70_000,)]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_and_shape_comes_back_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"t{i}": random_bytes(dtype, shape) for i, shape in enumerate(SHAPES)}
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    module = Holder(**tensors)
    save_checkpoint(tmp_path, module, step=1)
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8).zero_()
    load_checkpoint(tmp_path, module)
    assert {name: bits(tensor) for name, tensor in tensors.items()} == before


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.t(),
    "every second": lambda t: t[:, ::2],
    "channels last": lambda t: t.reshape(2, 3, 50, 100).to(memory_format=torch.channels_last),
    "flipped view": lambda t: t.as_strided((100, 200), (1, 150)),
    "conjugated": lambda t: t[:, :100].to(torch.complex64).mul(1j).conj(),
    "negated": lambda t: t[:, :100].to(torch.complex64).mul(1j).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS)
def test_tensors_of_any_strides_come_back_and_keep_them(view: str, tmp_path: Path) -> None:
    make = VIEWS[view]
    base = torch.arange(30_000.0).reshape(100, 300)
    module, other = Holder(w=make(base)), Holder(w=make(torch.zeros(100, 300)))
    expected, strides = module.w.detach().clone(), other.w.stride()
    save_checkpoint(tmp_path, module, step=1)
    load_checkpoint(tmp_path, other)
    assert same(
        other.w.detach().resolve_conj().resolve_neg(), expected.resolve_conj().resolve_neg()
    )
    assert other.w.stride() == strides
    assert same(open_checkpoint(tmp_path).tensor("model", "w"), expected)


class Tied(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("saved_tied", [True, False])
@pytest.mark.parametrize("loaded_tied", [True, False])
def test_tied_weights_are_stored_once_and_load_strictly_anywhere(
    saved_tied: bool, loaded_tied: bool, tmp_path: Path
) -> None:
    model = Tied(saved_tied)
    if not saved_tied:
        model.load_state_dict(Tied(True).state_dict())
    save_checkpoint(tmp_path, model, step=1)
    keys = open_checkpoint(tmp_path).keys("model")
    assert keys == (["embed.weight"] if saved_tied else ["embed.weight", "head.weight"])
    other = Tied(loaded_tied)
    load_checkpoint(tmp_path, other)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_non_persistent_buffers_are_neither_stored_nor_touched(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    save_checkpoint(tmp_path, model, step=1)
    stored = open_checkpoint(tmp_path)
    assert set(stored.keys("model")) == set(model.state_dict())
    assert stored.manifest.buffers == ["num_batches_tracked", "running_mean", "running_var"]
    model.scratch.fill_(7)
    load_checkpoint(tmp_path, model)
    assert model.scratch.tolist() == [7, 7]


class Extra(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize("value", [{"a": (1, torch.ones(2))}, torch.arange(3), None, [1, "x"]])
def test_extra_state_of_modules_comes_back(value: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, nn.Sequential(Extra(value)), step=1)
    model = nn.Sequential(Extra("other"))
    load_checkpoint(tmp_path, model)
    assert same(model[0].value, value)


class Counter(nn.Module):
    """Makes entries for its state dict, as metrics and quantized layers do: copies, and lists of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.count = 0
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.seen.append(x.detach().mean())
        return x * self.weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "log_weight"] = self.weight.detach().exp().log()
        destination[prefix + "count"] = torch.tensor(self.count)
        destination[prefix + "seen"] = list(self.seen)
        destination[prefix + "joined"] = torch.stack(self.seen) if self.seen else []

    def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state[prefix + "log_weight"])
        self.count = int(state[prefix + "count"])
        self.seen = list(state[prefix + "seen"])
        assert torch.equal(torch.as_tensor(state[prefix + "joined"]), torch.as_tensor(self.seen))


@pytest.mark.parametrize("wrap", [nn.Sequential, torch.compile])
def test_entries_that_a_module_makes_for_its_state_dict_come_back(
    wrap: Any, tmp_path: Path
) -> None:
    counter, again = Counter(), Counter()
    with torch.no_grad():
        counter.weight.fill_(3.0)
    counter(torch.arange(4.0))
    counter(torch.ones(4))
    Checkpointer(wrap(counter)).save_checkpoint(tmp_path, step=1)
    Checkpointer(wrap(again)).load_checkpoint(tmp_path)
    assert (again.count, again.seen) == (2, counter.seen)
    assert torch.equal(again.weight, counter.weight.exp().log())


class Factored(torch.optim.Optimizer):
    """State of every kind that optimizers have: factors, scalars of all sorts, lists, nothing at all."""

    def __init__(self, params: Any, lr: float = 0.1, odd: Any = None) -> None:
        super().__init__(params, {"lr": lr, "odd": odd})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                if p.ndim == 2:
                    state["row"] = p.grad.mean(1).double()
                    state["col"] = p.grad.mean(0).half()
                else:
                    state["full"] = p.grad.bfloat16()
                state["momentum"] = None
                state["ratio"] = float("inf")
                state["flag"] = True
                state["big"] = 2**70
                state["history"] = [p.grad.clone(), {"a/b": (1, p.grad.sum())}, torch.zeros(0)]
                state["mode"] = "warm"
                state["kind"] = torch.float8_e4m3fn
                state["slot#1"] = p.grad.sum()
                p.sub_(p.grad, alpha=group["lr"])


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


def two_layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))


def one_step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """The last layer gets no gradient."""
    loss = model[1](model[0](torch.ones(2, 3))).square().sum()

    def closure() -> torch.Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        value: torch.Tensor = model[1](model[0](torch.ones(2, 3))).square().sum()
        value.backward()
        return value

    loss.backward()
    for optimizer in optimizers:
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
    model.zero_grad()


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


def test_tensors_that_would_have_one_name_are_refused(tmp_path: Path) -> None:
    """Of two models, and in one where a wrapper's part of a name is left out."""
    models = {"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a.b": nn.Linear(3, 3)}
    with pytest.raises(ConfigurationError, match=r"two models have a tensor 'a\.b\.weight'"):
        save_checkpoint(tmp_path, models, tag="t")
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    compiled._buffers["weight"] = torch.ones(3)
    with pytest.raises(StateMismatchError, match=r"called '0\.weight' .*Give one of their"):
        save_checkpoint(tmp_path, nn.Sequential(compiled), tag="t")
    assert list(tmp_path.iterdir()) == []


def test_the_default_device_is_not_where_a_checkpoint_is_read_or_written(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    one_step(model, optimizer)
    optimizer.state[model[0].weight] |= {"count": 3, "on": True, "rate": 0.5, "all": [1, 2]}
    client_state = {"tensor": torch.ones(2), "array": np.ones(3)}
    other = two_layers(1)
    again = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    with torch.device("meta"):
        save_checkpoint(tmp_path, model, optimizer, tag="t", client_state=client_state)
        loaded = load_checkpoint(tmp_path, other, again)
        whole = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
        lazy = get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=True)
        parts = {key: value.contiguous() for key, value in lazy.items()}
        export_fp32(tmp_path, tmp_path / "out.bin")
    assert same(again.state_dict(), optimizer.state_dict())
    assert same(loaded.client_state["tensor"], client_state["tensor"])
    assert np.array_equal(loaded.client_state["array"], client_state["array"])
    for found in (dict(other.state_dict()), whole, parts, torch.load(tmp_path / "out.bin")):
        assert same(found, dict(model.state_dict()))


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


def adam_over(model: nn.Module, groups: list[list[str]]) -> torch.optim.Adam:
    parameters = dict(model.named_parameters())
    return torch.optim.Adam(
        [{"params": [parameters[name] for name in names], "lr": 0.1} for names in groups]
    )


NAMES = [f"{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]


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


class Meter:
    """Anything with `state_dict` and `load_state_dict` can stand where a scheduler stands."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


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


def test_frozen_parameters_can_be_left_out_and_keep_their_live_values(tmp_path: Path) -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    save_checkpoint(tmp_path, model, step=1, exclude_frozen_parameters=True)
    stored = open_checkpoint(tmp_path)
    assert stored.keys("model") == NAMES[2:]
    assert stored.manifest.excluded == ["0.bias", "0.weight"]
    other = two_layers(1)
    before = other[0].weight.clone()
    load_checkpoint(tmp_path, other)
    assert same(other[0].weight.detach(), before.detach())
    assert same(other[1].weight.detach(), model[1].weight.detach())


def test_what_does_not_fit_is_listed_at_once_and_nothing_changes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Holder(a=torch.ones(2), b=torch.ones(3), c=torch.ones(1)), step=1)
    live = Holder(a=torch.zeros(3), b=torch.zeros(3), new=torch.zeros(1))
    with pytest.raises(StateMismatchError) as caught:
        load_checkpoint(tmp_path, live)
    for part in (
        "'a': [2] in the checkpoint, [3] in the model",
        "Missing in the checkpoint: 'new'",
        "not in the model: 'c'",
        "Nothing was loaded",
    ):
        assert part in str(caught.value)
    assert live.b.tolist() == [0, 0, 0]
    with pytest.raises(StateMismatchError, match="'a'"):
        load_checkpoint(tmp_path, live, load_module_strict=False)
    partly = Holder(b=torch.zeros(3), new=torch.zeros(1))
    load_checkpoint(tmp_path, partly, load_module_strict=False)
    assert partly.b.tolist() == [1, 1, 1]
    assert partly.new.tolist() == [0]


def test_another_dtype_of_the_live_model_is_converted_to(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Holder(w=torch.arange(5.0)), step=1)
    live = Holder(w=torch.zeros(5, dtype=torch.bfloat16))
    load_checkpoint(tmp_path, live)
    assert live.w.tolist() == [0, 1, 2, 3, 4]


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


def draws() -> list[Any]:
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)]


def test_random_numbers_continue(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves one that is half used
    np.random.standard_normal()
    save_checkpoint(tmp_path, nn.Linear(1, 1), step=1)
    expected = draws()
    draws()
    load_checkpoint(tmp_path, nn.Linear(1, 1))
    assert draws() == expected
    with Checkpointer(nn.Linear(1, 1), rng=False) as checkpointer:
        checkpointer.load_checkpoint(tmp_path)
    assert draws() != expected


def test_client_state_of_every_shape(tmp_path: Path) -> None:
    for tag, state in enumerate([None, 3, [1, (2,)], {"t": torch.ones(2), 5: {1.5: None}}, {}]):
        save_checkpoint(tmp_path, nn.Linear(1, 1), tag=tag, step=1, client_state=state)
        assert same(load_checkpoint(tmp_path, nn.Linear(1, 1), tag=tag)[1], state)


def test_many_small_tensors_in_the_client_state_are_read_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"k{i}": torch.full((3,), float(i)) for i in range(500)}
    save_checkpoint(tmp_path, nn.Linear(1, 1), step=1, client_state=state)
    blocks: list[int] = []
    real = ShardReader.fetch

    def fetch(self: ShardReader, index: int, *args: Any) -> memoryview | None:
        blocks.append(index)
        return real(self, index, *args)

    monkeypatch.setattr(ShardReader, "fetch", fetch)
    _, found = load_checkpoint(tmp_path, nn.Linear(1, 1))
    assert same(found, state)
    assert 0 < len(blocks) < 10


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = Factored(model.parameters())
    one_step(model, optimizer)
    for name in ("one", "other"):
        save_checkpoint(tmp_path / name, model, optimizer, step=1, client_state={"s": {"a", "b"}})
    one, other = (files(tmp_path / name / "global_step1") for name in ("one", "other"))
    manifests = [json.loads(found.pop("manifest.json"))["manifest"] for found in (one, other)]
    assert one == other
    for manifest in manifests:
        del manifest["created"], manifest["timings"]
    assert manifests[0] == manifests[1]


def test_a_tag_can_be_overwritten_and_keeps_one_generation(tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    for number in range(1, 4):
        model.w.data.fill_(number)
        save_checkpoint(tmp_path, model, tag="t", step=number)
        names = set(files(tmp_path / "t"))
        suffix = f".g{number}" if number > 1 else ""
        assert names == {
            "manifest.json",
            *(f"{r}-00000-of-00001{suffix}.safetensors" for r in ("model", "state")),
        }
        assert open_checkpoint(tmp_path).manifest.generation == number
    load_checkpoint(tmp_path, model)
    assert model.w.tolist() == [3, 3]


def test_objects_in_each_others_place_are_refused() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters())
    with pytest.raises(ConfigurationError, match=r"model: found SGD.* The order is model, optim"):
        Checkpointer(optimizer, net)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="optimizer: found StepLR"):
        Checkpointer(net, [torch.optim.lr_scheduler.StepLR(optimizer, 1)])  # type: ignore[list-item]
    wrapper: Any = type("Wrapper", (), {"param_groups": optimizer.param_groups})()
    with pytest.raises(
        ConfigurationError, match="optimizer: found Wrapper, which has no register_st"
    ):
        Checkpointer(net, wrapper)


def test_keep_last_removes_the_oldest_committed_checkpoints(tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    (tmp_path / "global_step99").mkdir()
    (tmp_path / "global_step99" / "model-00000-of-00001.safetensors").write_bytes(b"not committed")
    with Checkpointer(model, keep_last=2) as checkpointer:
        for step in range(5):
            checkpointer.save_checkpoint(tmp_path, step=step)
    assert {p.name for p in tmp_path.iterdir()} == {
        "global_step3",
        "global_step4",
        "global_step99",
        "latest",
    }
    with pytest.raises(ConfigurationError, match="keep_last"):
        Checkpointer(model, keep_last=0)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", "%d {x} ü".encode(), b"y" * 200], ids=repr)
def test_directories_of_any_name(name: bytes, tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/" + name
    model, other = two_layers(), two_layers(1)
    save_checkpoint(os.fsdecode(place), model, tag="t")
    load_checkpoint(os.fsdecode(place), other)
    load_checkpoint(place, other)  # type: ignore[arg-type]
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(
        get_fp32_state_dict_from_zero_checkpoint(os.fsdecode(place)), dict(model.state_dict())
    )
    out = os.fsdecode(place) + "/out.bin"
    export_fp32(os.fsdecode(place), out)
    assert same(torch.load(out), dict(model.state_dict()))
    for command in ("ls", "inspect", "verify"):
        assert main([command, os.fsdecode(place)]) == 0


def test_a_path_that_no_file_system_knows_is_refused(tmp_path: Path) -> None:
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(ConfigurationError, match=r"x\\x00y': a path cannot hold"):
            call(f"{tmp_path}/x\0y", two_layers(), tag="t")


def test_latest_moves_only_when_asked(tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    save_checkpoint(tmp_path, model, tag="first", step=1)
    save_checkpoint(tmp_path, model, tag="aside", step=2, save_latest=False)
    assert (tmp_path / "latest").read_text() == "first\n"
    assert load_checkpoint(tmp_path, model)[0] == str(tmp_path / "first")
    assert load_checkpoint(tmp_path / "aside", model)[0] == str(tmp_path / "aside")


def test_steps_name_the_tag(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpointer = Checkpointer(model, optimizer)
    for _ in range(3):
        one_step(model, optimizer)
    assert checkpointer.save_checkpoint(tmp_path).tag == "global_step3"
    checkpointer.close()
    one_step(model, optimizer)
    assert checkpointer.global_step == 3
    with pytest.raises(ConfigurationError, match="tag= or step="):
        save_checkpoint(tmp_path, model)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": {"a/b": nn.Linear(1, 1)}}, "names of models"),
        ({"model": nn.Linear(1, 1), "tag_validation": "maybe"}, "tag_validation"),
        ({"model": nn.Linear(1, 1), "keep_last": 2.5}, "keep_last must be at least 1 or None"),
        ({"model": nn.Linear(1, 1), "timeout": -1}, "timeout=-1: expected a number of seconds"),
        ({"model": nn.Linear(1, 1), "zero_stage": 5}, "zero_stage=5: expected 0, 1, 2, 3"),
        ({"model": nn.Linear(1, 1), "engine": "asnyc"}, "engine='asnyc': expected 'sync'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Checkpointer(**arguments)


@pytest.mark.parametrize("step", [-1, 1.5, "3", None])
def test_a_step_that_no_manifest_could_hold_is_refused(step: Any, tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    with pytest.raises(
        ConfigurationError, match=r"step must be a natural number|needs tag= or step="
    ):
        save_checkpoint(tmp_path / "new", model, tag=None if step is None else "t", step=step)
    assert not (tmp_path / "new").exists()
    save_checkpoint(tmp_path, model, step=np.int64(3))  # type: ignore[arg-type]
    assert open_checkpoint(tmp_path).manifest.step == 3


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.register_buffer("b", torch.ones(1).expand(5))


def test_a_tensor_that_cannot_be_filled_is_named_before_anything_changes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Expanded(), step=1)
    live = Expanded()
    live.w.data.fill_(7)
    with pytest.raises(StateMismatchError, match=r"tensor 'b' of the model was expanded.*clone"):
        load_checkpoint(tmp_path, live)
    assert live.w.tolist() == [7, 7]
    live.b = live.b.clone()
    load_checkpoint(tmp_path, live)
    assert live.w.tolist() == [0, 0]


def test_parameters_without_a_shape_yet_are_named(tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"tensor 'weight' of a lazy module"):
        save_checkpoint(tmp_path, nn.LazyLinear(3), step=1)


def test_odd_names_are_kept(tmp_path: Path) -> None:
    names = ["a", "a/b", "@x ü\n", "step", "#int", "__metadata__"]
    model, other = (
        Holder(**{n: torch.full((2,), float(i)) for i, n in enumerate(names)}) for _ in "ab"
    )
    optimizer, again = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters())
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, step=1)
    load_checkpoint(tmp_path, other, again)
    assert same(again.state_dict(), optimizer.state_dict())
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_a_missing_latest_falls_back_with_a_warning(tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    for step in (1, 2):
        save_checkpoint(tmp_path, model, step=step)
    (tmp_path / "latest").unlink()
    with pytest.warns(UserWarning, match="latest"):
        path, _ = load_checkpoint(tmp_path, model)
    assert path == str(tmp_path / "global_step2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path, model, tag="global_step1")


def test_lazy_client_state_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, nn.Linear(1, 1), tag="a", step=1)
    lazy = open_checkpoint(tmp_path).lazy("model", "weight")
    save_checkpoint(tmp_path, nn.Linear(1, 1), tag="b", step=1, client_state=[lazy])
    _, found = load_checkpoint(tmp_path, nn.Linear(1, 1), tag="b")
    assert type(found[0]) is torch.Tensor
    assert torch.equal(found[0], lazy.materialize())
