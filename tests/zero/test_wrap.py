"""Which submodules become units, under every policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import resolve_units
from zero_ckpt.zero.wrap import UNIT_NUMEL

WIDE = UNIT_NUMEL // 100 + 1  # Linear(100, WIDE) is a unit by its size


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.attention(x, x, x)[0])


class Model(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Coder(Model):
    """Offers more than being called."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x


def blocks(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


def units(module: nn.Module, wrap: Any = "auto", root: Any = "shard") -> list[str]:
    return list(resolve_units(module, wrap, root=root))


# --- auto: repeated blocks ------------------------------------------------------------------------


def test_repeated_blocks_of_a_list_are_units() -> None:
    model = Model(embed=nn.Embedding(9, 4), layers=blocks(3), head=nn.Linear(4, 9))
    assert units(model) == ["layers.0", "layers.1", "layers.2"]


def test_repeated_blocks_of_a_sequential_are_units() -> None:
    model = Model(stage=nn.Sequential(nn.Linear(4, 4), Block(), nn.ReLU(), Block()))
    assert units(model) == ["stage.1", "stage.3"]


def test_only_the_outermost_repeated_blocks_are_units() -> None:
    experts = [Model(experts=blocks(2), gate=nn.Linear(4, 2)) for _ in range(2)]
    assert units(Model(layers=nn.ModuleList(experts))) == ["layers.0", "layers.1"]


def test_lists_in_different_places_each_give_units() -> None:
    model = Model(encoder=Model(layers=blocks(2)), decoder=Model(layers=blocks(2)))
    assert units(model) == [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)]


def test_repeated_layers_without_parts_are_no_blocks() -> None:
    assert units(Model(net=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))) == []


def test_alternatives_in_a_dict_are_no_blocks() -> None:
    assert units(Model(tasks=nn.ModuleDict({"a": Block(), "b": Block()}))) == []


def test_blocks_without_parameters_are_no_units() -> None:
    model = Model(nets=nn.ModuleList(nn.Sequential(nn.ReLU()) for _ in range(3)))
    assert units(model) == []


# --- auto: Hugging Face ---------------------------------------------------------------------------


class Pretrained(Model):
    _no_split_modules = ["Block", "ClassThatIsGone"]  # noqa: RUF012 - the convention's type


def test_the_classes_that_a_hugging_face_model_names_are_units() -> None:
    inner = Pretrained(only=Block(), others=nn.ModuleList(Model(a=nn.Linear(2, 2)) for _ in "ab"))
    assert units(Model(model=inner)) == ["model.only"]


def test_names_that_match_nothing_fall_back_to_repeated_blocks() -> None:
    class Stale(Model):
        _no_split_modules = ("ClassThatIsGone",)

    assert units(Stale(layers=blocks(2))) == ["layers.0", "layers.1"]


def test_a_model_that_names_nothing_falls_back_to_repeated_blocks() -> None:
    class Unset(Model):
        _no_split_modules = None

    assert units(Unset(layers=blocks(2))) == ["layers.0", "layers.1"]


# --- auto: by size --------------------------------------------------------------------------------


def test_large_layers_of_a_sequential_are_units() -> None:
    net = nn.Sequential(nn.Linear(100, WIDE), nn.ReLU(), nn.Linear(WIDE, 100), nn.Linear(3, 3))
    assert units(Model(net=net)) == ["net.0", "net.2"]


def test_large_modules_are_units_and_small_ones_are_not() -> None:
    model = Model(big=Model(proj=nn.Linear(100, WIDE)), small=Model(proj=nn.Linear(100, WIDE // 2)))
    assert units(model) == ["big"]


def test_a_large_layer_that_stands_alone_is_no_unit() -> None:
    # Its weight may be used without calling it, as with tied or regularized weights.
    assert units(Model(embed=nn.Embedding(WIDE, 100), head=nn.Linear(100, WIDE))) == []


def test_a_large_module_with_other_methods_is_no_unit() -> None:
    assert units(Model(vae=Coder(proj=nn.Linear(100, WIDE)))) == []


def test_attention_is_never_split() -> None:
    net = nn.Sequential(nn.MultiheadAttention(UNIT_NUMEL // 1000, 1))
    assert units(Model(net=net)) == ["net.0"]


# --- auto, with a root that is not sharded --------------------------------------------------------


def test_the_children_of_a_replicated_root_are_units() -> None:
    model = Model(
        generator=nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)),
        discriminators=nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2))}),
        vae=Coder(layers=blocks(2)),
        head=nn.Linear(4, 4),
    )
    assert units(model) == ["vae.layers.0", "vae.layers.1"]
    expected = ["generator", "discriminators.a", "vae.layers.0", "vae.layers.1"]
    assert units(model, root="replicate") == expected


# --- given classes and predicates -----------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Block, {Block}, [Block], (Block, nn.Embedding)])
def test_classes_may_be_given_in_any_form(wrap: Any) -> None:
    model = Model(one=Block(), two=Model(three=Block()))
    assert units(model, wrap) == ["one", "two.three"]


def test_units_may_nest_and_come_innermost_first() -> None:
    model = Model(side=Model(own=nn.Linear(2, 2), block=Block()))
    assert units(model, {Model, Block, nn.MultiheadAttention}) == [
        "side.block.attention",
        "side.block",
        "side",
    ]


def test_a_predicate_chooses_modules() -> None:
    model = Model(layers=blocks(2), head=nn.Linear(2, 2))
    assert units(model, lambda m: isinstance(m, nn.Linear)) == [
        "layers.0.attention.out_proj",
        "layers.0.mlp.0",
        "layers.0.mlp.2",
        "layers.1.attention.out_proj",
        "layers.1.mlp.0",
        "layers.1.mlp.2",
        "head",
    ]
    assert units(model, lambda m: False) == []


def test_a_predicate_may_match_what_cannot_be_a_unit() -> None:
    model = Model(layers=blocks(1), relu=nn.ReLU())
    assert "layers" not in units(model, lambda m: True)
    assert "relu" not in units(model, lambda m: True)


def test_a_unit_whose_parameters_all_belong_to_units_in_it_is_dropped() -> None:
    model = Model(side=Model(block=Block()))
    assert units(model, {Model, Block}) == ["side.block"]


def test_an_empty_set_of_classes_gives_no_units() -> None:
    assert units(Model(layers=blocks(2)), set()) == []


def test_classes_that_match_nothing_are_refused_with_those_present() -> None:
    with pytest.raises(ConfigurationError, match=r"is a LSTM.*Block, Linear, Model, Multihead"):
        resolve_units(Model(layers=blocks(1)), {nn.LSTM})
    with pytest.raises(ConfigurationError, match="is a ModuleList"):
        resolve_units(Model(layers=blocks(1)), {nn.ModuleList})


@pytest.mark.parametrize(
    ("wrap", "message"), [("all", "expected 'auto'"), ({int}, "subclasses of torch.nn.Module")]
)
def test_something_else_is_refused(wrap: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve_units(Model(), wrap)


# --- wrappers -------------------------------------------------------------------------------------


def test_compiled_blocks_are_units_by_the_module_inside() -> None:
    layers = nn.ModuleList(torch.compile(Block(), backend="eager") for _ in range(2))
    expected = ["layers.0._orig_mod", "layers.1._orig_mod"]
    assert units(Model(layers=layers)) == expected
    assert units(Model(layers=layers), Block) == expected


def test_checkpointed_blocks_are_units_with_their_wrapper() -> None:
    layers = nn.ModuleList(checkpoint_wrapper(Block()) for _ in range(2))
    assert units(Model(layers=layers)) == ["layers.0", "layers.1"]
    assert units(Model(layers=layers), Block) == ["layers.0", "layers.1"]


# --- shared parameters ----------------------------------------------------------------------------


def tie(model: nn.Module, one: str, other: str) -> None:
    name, _, attribute = other.rpartition(".")
    setattr(model.get_submodule(name), attribute, model.get_parameter(one))


def test_weights_tied_within_the_root_or_within_a_unit_change_nothing() -> None:
    model = Model(embed=nn.Embedding(9, 4), layers=blocks(2), head=nn.Linear(4, 9))
    tie(model, "embed.weight", "head.weight")
    tie(model, "layers.0.mlp.0.weight", "layers.0.mlp.2.weight")
    assert units(model) == ["layers.0", "layers.1"]


def test_units_that_share_a_weight_with_each_other_are_dropped() -> None:
    model = Model(layers=blocks(3))
    tie(model, "layers.0.mlp.0.weight", "layers.2.mlp.0.weight")
    assert units(model) == ["layers.1"]


def test_a_unit_that_shares_a_weight_with_the_root_is_dropped() -> None:
    model = Model(layers=blocks(3), head=nn.Linear(4, 8))
    tie(model, "head.weight", "layers.0.mlp.0.weight")
    assert units(model) == ["layers.1", "layers.2"]


def test_only_the_inner_unit_is_dropped_for_a_weight_shared_with_the_outer() -> None:
    model = Model(outer=Model(block=Block(), own=nn.Linear(4, 8)))
    tie(model, "outer.own.weight", "outer.block.mlp.0.weight")
    assert units(model, {Model, Block}) == ["outer"]


def test_a_module_used_in_two_places_is_one_unit() -> None:
    block = Block()
    model = Model(layers=nn.ModuleList([block, Block(), block]), again=block)
    assert units(model) == ["layers.0", "layers.1"]


def test_units_that_share_a_module_are_dropped() -> None:
    model = Model(layers=blocks(3))
    model.layers[2].mlp = model.layers[0].mlp
    assert units(model) == ["layers.1"]


# --- properties -----------------------------------------------------------------------------------

KINDS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(2, 2),
    lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    Block,
    nn.ReLU,
    lambda: nn.ModuleList([Block()]),
]


@st.composite
def models(draw: st.DrawFn, depth: int = 3) -> nn.Module:
    """Trees of modules, in which some modules and some weights occur more than once."""
    children: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        if depth and draw(st.booleans()):
            children.append(draw(models(depth - 1)))
        elif children and draw(st.booleans()):
            children.append(draw(st.sampled_from(children)))
        else:
            children.append(draw(st.sampled_from(KINDS))())
    model = Model(**{f"child{i}": child for i, child in enumerate(children)})
    linears = [m for m in model.modules() if type(m) is nn.Linear and m.weight.shape == (2, 2)]
    if len(linears) > 1 and draw(st.booleans()):
        draw(st.sampled_from(linears)).weight = draw(st.sampled_from(linears)).weight
    return model


POLICIES = ["auto", {nn.Linear}, {Model}, lambda m: True, lambda m: len(list(m.children())) == 2]


@settings(max_examples=60, deadline=None)
@given(model=models(), policy=st.integers(0, len(POLICIES) - 1), root=st.booleans())
def test_every_parameter_is_in_exactly_one_unit_or_the_root(
    model: nn.Module, policy: int, root: bool
) -> None:
    try:
        found = resolve_units(model, POLICIES[policy], root="shard" if root else "replicate")
    except ConfigurationError:
        assert policy in (1, 2)
        return
    ids = {id(unit) for unit in found.values()}
    assert id(model) not in ids
    order = list(found)
    for path, unit in found.items():
        assert model.get_submodule(path) is unit
        inside = {id(m) for m in unit.modules() if m is not unit} & ids
        later = {id(found[other]) for other in order[order.index(path) :]}
        assert not inside & later, "units in a unit come before it"

    homes: dict[int, set[int]] = {}

    def visit(module: nn.Module, home: int) -> None:
        home = id(module) if id(module) in ids else home
        for parameter in module.parameters(recurse=False):
            homes.setdefault(id(parameter), set()).add(home)
        for child in module.children():
            visit(child, home)

    visit(model, id(model))
    assert all(len(home) == 1 for home in homes.values())
