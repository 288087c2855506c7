"""What a checkpoint holds of models, down to dtypes, strides and odd names. In one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.small import (
    NAMES,
    Holder,
    bits,
    one_step,
    same,
    two_layers,
)
from zero_ckpt import (
    Checkpointer,
    export_fp32,
    get_fp32_state_dict_from_zero_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.core.computed import empty_like_computed
from zero_ckpt.core.dtensors import DTYPE_NAMES
from zero_ckpt.core.planner import Placed
from zero_ckpt.errors import ConfigurationError, StateMismatchError


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


def test_entries_that_were_no_tensors_when_they_were_saved_come_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Counter(), step=1)
    later = Counter()
    later(torch.ones(4))
    load_checkpoint(tmp_path, later)
    assert (later.count, later.seen) == (0, [])


class Averages(nn.Module):
    """Keeps tensors that are no buffers, and a weight that its state dict has as a parameter of another scale."""

    def __init__(self) -> None:
        super().__init__()
        self.none_yet = nn.Parameter(torch.ones(0))
        self.weight = nn.Parameter(torch.ones(2))
        self.mean = torch.zeros(2)
        self.seen = torch.zeros(0)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "none_yet"] = self.none_yet
        destination[prefix + "scaled"] = nn.Parameter(self.weight.detach() * 8)
        destination[prefix + "mean"] = self.mean
        destination[prefix + "seen"] = self.seen

    def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state[prefix + "scaled"] / 8)
        self.mean, self.seen = state[prefix + "mean"], state[prefix + "seen"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = Averages()
        self.other = self.one


def test_what_a_module_in_two_places_makes_for_its_state_dict_comes_back(tmp_path: Path) -> None:
    model, again = Twice(), Twice()
    with torch.no_grad():
        model.one.weight.fill_(3.0)
    model.one.mean, model.one.seen = torch.arange(2.0), torch.arange(5.0)
    save_checkpoint(tmp_path, model, step=1)
    load_checkpoint(tmp_path, again)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_what_a_module_makes_for_its_state_dict_comes_back_to_the_same_device() -> None:
    placed = Placed("F32", (5,), ())
    assert empty_like_computed(placed, torch.empty(2, device="meta")).is_meta
    assert empty_like_computed(placed, None).device.type == "cpu"


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
