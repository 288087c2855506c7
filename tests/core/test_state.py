"""Live state by name: wrappers leave no trace, tied weights have one home, state names say what values were."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from zero_ckpt.core.naming import ParameterNames, parameter_names
from zero_ckpt.core.state import (
    capture_model,
    capture_models,
    capture_optimizer,
)
from zero_ckpt.core.state_values import split_state_name


def net() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return nn.Sequential(inner, nn.Linear(2, 1))


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "parallel": nn.DataParallel,
}
KEYS = list(net().state_dict())
NAMES = [name for name, _ in net().named_parameters()]


@pytest.mark.parametrize("outer", list(permutations(WRAPPERS, 2)), ids="+".join)
@pytest.mark.parametrize("inner", [(), ("checkpoint",), ("compile", "checkpoint")], ids="+".join)
def test_wrappers_leave_no_trace_in_names(outer: tuple[str, ...], inner: tuple[str, ...]) -> None:
    raw = net()
    for place in (raw[0], raw):
        for name in inner:
            place[0] = WRAPPERS[name](place[0])
    model: nn.Module = raw
    for name in outer:
        model = WRAPPERS[name](model)
    state = capture_model(model)
    assert list(state.tensors) == KEYS
    assert list(parameter_names(model).values()) == NAMES
    assert state.buffers == {key for key in KEYS if "running" in key or "num" in key}
    live = dict(zip(NAMES, model.parameters(), strict=True))
    assert all(state.tensors[name] is live[name] for name in NAMES)


class Confusing(nn.Module):
    """Children with the names that wrappers use, in a module that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(1, 1)
        self._orig_mod = nn.ModuleDict({"_checkpoint_wrapped_module": nn.Linear(1, 1)})


def test_a_users_own_module_keeps_its_names() -> None:
    model = Confusing()
    assert list(capture_model(model).tensors) == list(model.state_dict())
    wrapped = checkpoint_wrapper(Confusing())
    assert list(capture_model(wrapped).tensors) == list(model.state_dict())


class WithoutTeacher(nn.Linear):
    """Leaves a part of itself out of its state dict."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        return {key: value for key, value in found.items() if key != "bias"}


def test_a_models_own_state_dict_counts_within_wrappers() -> None:
    model = WithoutTeacher(2, 2)
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        assert capture_model(wrapped).tensors.keys() == {"weight"}  # type: ignore[arg-type]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.again = self.first
        self.register_buffer("one", torch.ones(3))
        self.register_buffer("view", self.one[:])
        self.register_buffer("part", self.one[1:])


def test_tied_weights_have_one_home() -> None:
    state = capture_model(Shared())
    assert list(state.tensors) == ["one", "part", "first.weight", "first.bias", "second.bias"]
    assert state.aliases == {
        "view": "one",
        "second.weight": "first.weight",
        "again.weight": "first.weight",
        "again.bias": "first.bias",
    }


def test_empty_tensors_are_not_taken_for_one_another() -> None:
    model = nn.Module()
    model.register_buffer("a", torch.empty(0))
    model.register_buffer("b", torch.empty(0))
    assert capture_model(model).aliases == {}


def test_frozen_parameters_and_buffers_are_told_apart() -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    state = capture_model(model)
    assert state.frozen == {"1.weight"}
    assert not state.frozen & state.buffers


def test_several_models_are_kept_apart_by_name() -> None:
    state = capture_models({"g": Shared(), "d": nn.Linear(1, 1)})
    assert "g.first.weight" in state.tensors
    assert list(state.tensors)[-2:] == ["d.weight", "d.bias"]
    assert state.aliases["g.second.weight"] == "g.first.weight"


class Note(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.ones(1))

    def get_extra_state(self) -> Any:
        return self.value


def test_extra_state_is_an_object_even_when_it_is_a_tensor() -> None:
    model = nn.Sequential(Note({"n": 1}), checkpoint_wrapper(Note(torch.ones(2))))
    state = capture_model(model)
    assert list(state.extra) == ["0._extra_state", "1._extra_state"]
    assert list(state.tensors) == ["0.weight", "1.weight"]


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="#/"), min_size=1)


@given(names, st.sampled_from(["", "int", "float", "bool", "none", "json"]), st.text(max_size=5))
def test_state_names_say_what_the_value_was(name: str, kind: str, path: str) -> None:
    assert split_state_name(f"{name}#{kind}" if kind else name) == (name, kind)
    assert split_state_name(f"{name}#entry/{path}") == (name, "entry")
    assert split_state_name(f"{name}#other") == (f"{name}#other", "")


def test_values_of_every_kind_are_named_after_their_parameter() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter, nn.Parameter(torch.ones(1))], 0.1)
    tensor = torch.ones(2)
    optimizer.state[parameter] = {
        "t": tensor, "i": 3, "f": 0.5, "b": True, "n": None, "s": "x", "l": [tensor, 1], "big": 2**80,
    }  # fmt: skip
    found = capture_optimizer(optimizer, ParameterNames({id(parameter): "layer/w"}), "g/").tensors
    assert list(found) == [f"g/layer/w/{name}" for name in [
        "t", "i#int", "f#float", "b#bool", "n#none", "s#json", "l#json", "l#entry/0", "big#json",
    ]]  # fmt: skip
    assert found["g/layer/w/t"] is tensor
    assert found["g/layer/w/f#float"].item() == 0.5
    assert found["g/layer/w/b#bool"].dtype == torch.bool


def test_parameters_of_no_known_model_are_called_by_their_place() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([{"params": []}, {"params": [parameter]}])
    record = capture_optimizer(optimizer, ParameterNames()).record
    assert [group["params"] for group in record["groups"]] == [[], ["param_groups.1.0"]]
    assert record["class"] == "Adam"
