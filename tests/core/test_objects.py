"""Objects come back as they were, of the same types, and opening them never runs code."""

from __future__ import annotations

import base64
import collections
import copy
import enum
import json
import math
import pathlib
import pickle
import zoneinfo
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, time, timedelta, timezone
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from zero_ckpt.core.objects import (
    EncodedObjects,
    Shown,
    decode_objects,
    encode_objects,
    show_objects,
)
from zero_ckpt.errors import ConfigurationError, CorruptShardError, UnsafeObjectError

REFUSED = (CorruptShardError, UnsafeObjectError)


def no_dtensor(name: str) -> Any:
    raise AssertionError(f"no DTensor was stored, but '{name}' is asked for")


def entries_of(encoded: EncodedObjects) -> Callable[[str], torch.Tensor]:
    """What a shard file gives back: new memory, contiguous, without history."""
    return lambda name: encoded.entries[name].resolve_conj().resolve_neg().contiguous().clone()


def round_trip(tree: Any, *, weights_only: bool = True) -> Any:
    encoded = encode_objects(tree, "objects")
    entry = entries_of(encoded)
    return decode_objects(encoded.json, entry, dtensor=no_dtensor, weights_only=weights_only)


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, where NaN equals NaN and 0.0 does not equal -0.0; order of keys counts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (a != a and b != b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        factory = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        return factory and same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return (
            same_kind
            and (not isinstance(a, nn.Parameter) or a.requires_grad == b.requires_grad)
            and (
                torch.equal(
                    a.detach().contiguous().reshape(-1).view(torch.uint8),
                    b.detach().contiguous().reshape(-1).view(torch.uint8),
                )
            )
        )
    return bool(a == b)


text = st.text(st.characters(), max_size=4)  # surrogates included
numbers = st.integers() | st.floats() | st.complex_numbers() | st.booleans()
zones = st.sampled_from([None, timezone.utc, timezone(timedelta(minutes=-90))])
times = st.builds(datetime.combine, st.dates(), st.times(), zones).map(lambda t: t.replace(fold=0))
dates = times | st.dates() | st.timedeltas()
array_dtypes = st.sampled_from(
    ["?", "i1", "<i2", ">i4", "i8", "u1", "<u2", "u4", "u8", "f2", "f4", ">f8", "c8", "c16", "g"]
)
arrays = hnp.arrays(array_dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
scalars = array_dtypes.map(lambda d: np.ones((), d)[()]) | st.floats(width=32).map(np.float32)
tensors = hnp.arrays(
    st.sampled_from(["?", "i1", "i8", "f4", "c8"]), hnp.array_shapes(min_dims=0, min_side=0)
).map(torch.from_numpy)
others = st.sampled_from(
    [
        torch.float32,
        torch.float8_e4m3fn,
        torch.device("cpu"),
        torch.device("cuda", 3),
        torch.Size([2, 0]),
        pathlib.Path("a/b"),
        slice(1, None, -2),
        range(3, 30, 4),
        range(2**70),
        b"\0\xff",
        bytearray(b"x"),
        np.float64(-0.0),
        np.bool_(True),
    ]
)
keys = (
    st.none() | st.integers() | text | st.floats() | st.tuples(st.integers(), text) | st.booleans()
)
leaves = (
    st.none() | text | numbers | dates | arrays | scalars | tensors | others | st.binary(max_size=4)
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(keys, inner), max_size=3)
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(text, inner, max_size=3)
        | pairs.map(dict)
        | pairs.map(OrderedDict)
        | st.tuples(st.sampled_from([None, list, int, dict]), pairs).map(lambda a: defaultdict(*a))
        | st.frozensets(keys, max_size=3)
        | st.sets(keys, max_size=3)
        | st.dictionaries(text, st.integers(), max_size=3).map(collections.Counter)
    )


@settings(max_examples=120)
@given(st.recursive(leaves, containers, max_leaves=8))
def test_any_supported_tree_comes_back(tree: Any) -> None:
    assert same(round_trip(tree), tree)


@given(st.recursive(leaves, containers, max_leaves=6))
def test_names_of_entries_can_be_read_by_any_safetensors_reader(tree: Any) -> None:
    for name in encode_objects({"tree": tree}, "objects").entries:
        assert name.encode().decode() == name


def test_dicts_whose_keys_look_like_ours_come_back() -> None:
    for tree in (
        {"$tuple": [1]},
        {"$pickle": ["a", "b"]},
        {"$": {}},
        {"a": 1, "$b": 2},
        {"$dict": [[1, 2]]},
    ):
        assert same(round_trip(tree), tree)


@pytest.mark.parametrize(
    "make",
    [
        lambda p, o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda p, o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 5]),
        lambda p, o: torch.optim.lr_scheduler.ConstantLR(o),
        lambda p, o: torch.optim.lr_scheduler.LinearLR(o),
        lambda p, o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        lambda p, o: torch.optim.lr_scheduler.PolynomialLR(o),
        lambda p, o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda p, o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
        lambda p, o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda p, o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2),
        lambda p, o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
        lambda p, o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5),
        lambda p, o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda step: 0.5),
        lambda p, o: torch.optim.swa_utils.SWALR(o, 0.1),
        lambda p, o: torch.optim.lr_scheduler.ChainedScheduler(
            [torch.optim.lr_scheduler.StepLR(o, 2), torch.optim.lr_scheduler.MultiStepLR(o, [2])]
        ),
        lambda p, o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.StepLR(o, 2)], [1]
        ),
    ],
)  # fmt: skip
def test_the_state_of_every_scheduler_needs_no_pickle(make: Callable[..., Any]) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    scheduler = make(parameter, optimizer)
    optimizer.step()
    scheduler.step(*([1.0] if "Plateau" in type(scheduler).__name__ else []))
    state = scheduler.state_dict()
    assert same(round_trip(copy.deepcopy(state)), state)


def test_an_object_that_appears_twice_is_stored_once_and_shared_again() -> None:
    tensor, array = torch.ones(3), np.ones(2)
    encoded = encode_objects({"a": [tensor, array], "b": (tensor, array)}, "objects")
    assert len(encoded.entries) == 2
    tree = decode_objects(encoded.json, entries_of(encoded), dtensor=no_dtensor)
    assert tree["a"][0] is tree["b"][0]
    assert tree["a"][1] is tree["b"][1]


def test_entries_of_equal_paths_have_names_of_their_own() -> None:
    tree = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: {}, "1": torch.full((1,), 2.0)}
    assert same(round_trip(tree), tree)


class Color(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int


class Masked:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masked)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Masked()"


SUMMER = datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
PICKLED = [
    Color.RED, Point(1), Masked(), np.ma.masked_array([1, 2], [True, False]), np.datetime64("2024-01-01"),
    np.array(["a"]), np.array([1, "x"], dtype=object), torch.ones(2).to_sparse(), SUMMER, np.zeros(2, "i4,f4"),
    defaultdict(Masked), time(1, 2), type("Sub", (dict,), {})(),
]  # fmt: skip


@pytest.mark.parametrize("value", PICKLED[:-1], ids=lambda v: type(v).__name__)
def test_other_values_are_pickled_and_refused_with_path_and_type(value: Any) -> None:
    tree = {"outer": [{"inner": value}]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    with pytest.raises(UnsafeObjectError, match="weights_only=False") as caught:
        round_trip(tree)
    assert "outer/0/inner" in str(caught.value)
    assert kind in str(caught.value)
    again = round_trip(tree, weights_only=False)["outer"][0]["inner"]
    assert type(again) is type(value)
    assert repr(again) == repr(value)


def test_what_cannot_be_pickled_is_named_when_it_is_saved() -> None:
    with pytest.raises(ConfigurationError, match=r"objects/a/fn: builtins\.function"):
        encode_objects({"a": {"fn": lambda: None}}, "objects")
    with pytest.raises(ConfigurationError, match=r"objects/a"):
        encode_objects({"a": PICKLED[-1]}, "objects")


def test_cycles_are_pickled() -> None:
    tree: dict[str, Any] = {"list": [1]}
    tree["list"].append(tree["list"])
    with pytest.raises(UnsafeObjectError):
        round_trip(tree)
    again = round_trip(tree, weights_only=False)["list"]
    assert again[0] == 1
    assert again[1][1] is again[1]


def test_a_tree_that_is_too_deep_for_json_is_pickled() -> None:
    tree: Any = 7
    for _ in range(150):
        tree = [tree]
    assert round_trip(tree, weights_only=False) == tree


class Loud:
    """Pickles to a call that must never be made."""

    calls = 0

    def __reduce__(self) -> Any:
        return _shout, ()


def _shout() -> str:
    Loud.calls += 1
    return "ran"


def test_opening_runs_no_code() -> None:
    blob = pickle.dumps(Loud())
    encoded = base64.b64encode(blob).decode()
    attacks: list[Any] = [
        {"$pickle": ["x", "tests.Loud"]}, {"$array": "x"}, {"$parameter": "x"}, {"$scalar": ["O", encoded]},
        {"$ndarray": ["O", [1], encoded]}, {"$ndarray": ["|O8", [1], encoded]}, {"$dtype": "load"},
        {"$defaultdict": ["eval", []]}, {"$defaultdict": [["list"], []]}, {"$datetime": encoded},
        {"$dtype": "_dynamo"}, {"$dtype": "classes"},
    ]  # fmt: skip
    tensor = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    for attack in attacks:
        with suppress(*REFUSED):
            decode_objects(json.dumps(attack).encode(), lambda _: tensor, dtensor=no_dtensor)
        with suppress(*REFUSED):
            show_objects(json.dumps(attack).encode(), str)
    assert Loud.calls == 0
    assert round_trip([Loud()], weights_only=False) == ["ran"]


KINDS = """
    $tuple $set $frozenset $dict $odict $counter $defaultdict $float $complex $int $bytes $bytearray $tensor $parameter
    $dtensor $array $scalar $ndarray $dtype $device $size $slice $range $path $datetime $date $timedelta $pickle $other
"""
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | text
    | st.sampled_from(["x", "<f8", "O", "nan", "0x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(text, inner, max_size=2)
        | st.tuples(
            st.sampled_from(KINDS.split()),
            inner,
        ).map(lambda pair: {pair[0]: pair[1]})
    ),
    max_leaves=6,
)


@settings(max_examples=200)
@given(json_values)
def test_hostile_json_gives_a_tree_or_the_documented_errors(value: Any) -> None:
    data = json.dumps(value).encode()

    def entry(name: str) -> torch.Tensor:
        if name != "x":
            raise CorruptShardError(f"no entry {name!r}")
        return torch.zeros(2)

    with suppress(*REFUSED):
        decode_objects(data, entry, dtensor=entry, where="here")
    with suppress(*REFUSED):
        show_objects(data, str)


HOSTILE = [
    b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'{"$timedelta": [1e30]}',
    b'{"$timedelta": [99999999999]}', b'{"$device": "nowhere"}', b'{"$device": []}', b'{"$dtype": "load"}',
    b'{"$ndarray": ["<f8", [1000000000000], ""]}', b'{"$ndarray": ["<f8", [-1, 0], ""]}', b'{"$scalar": ["<f8", ""]}',
    b'{"$scalar": ["(1000000000,)f8", ""]}', b'{"$scalar": ["(", ""]}', b'{"$range": [0, 1, 0]}', b'{"$path": 3}',
    b'{"$size": [-1, "a"]}', b'{"$bytes": "a"}', b'{"$int": "zz"}', b'{"$float": "1"}', b'{"$complex": []}',
    b'{"$dict": [1]}', b'{"$set": [[]]}', b'{"$tensor": []}', b'{"$tensor": "gone"}', b'{"$pickle": []}',
    b'{"$slice": {}}', b'{"$date": "2024-13-01"}', b'{"$unknown": 1}', b'{"$counter": 3}',
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: data[:30].decode(errors="replace"))
def test_hostile_json_is_refused(data: bytes) -> None:
    def entry(name: str) -> torch.Tensor:
        raise KeyError(name)

    with pytest.raises((CorruptShardError, UnsafeObjectError), match="objects"):
        decode_objects(data, entry, dtensor=no_dtensor)


def test_a_pickle_whose_class_is_gone_says_so() -> None:
    encoded = encode_objects([Loud()], "objects")
    gone = torch.frombuffer(bytearray(b"cnowhere.at_all\nThing\n."), dtype=torch.uint8)
    with pytest.raises(UnsafeObjectError, match=r"'0'.*tests\.core\.test_objects\.Loud.*nowhere"):
        decode_objects(encoded.json, lambda _: gone, dtensor=no_dtensor, weights_only=False)


def test_frozen_parameters_stay_frozen() -> None:
    tree = [nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))]
    assert [p.requires_grad for p in round_trip(tree)] == [False, True]


def test_equal_state_gives_equal_bytes() -> None:
    words = [f"word{i}" for i in range(50)]
    one, other = set(words), {*words[::-1]}
    assert encode_objects([one, {"t": torch.ones(2)}], "objects").json == (
        encode_objects([other, {"t": torch.ones(2)}], "objects").json
    )


def test_what_is_shown_to_people_needs_no_entries() -> None:
    tree = {
        "t": torch.ones(2),
        "d": torch.float32,
        "p": Point(1),
        "n": np.float32(1),
        "x": (1, None),
    }
    shown = show_objects(encode_objects(tree, "objects").json, lambda name: f"<{name}>")
    assert repr(shown["t"]) == "<objects/t>"
    assert isinstance(shown["d"], Shown)
    assert "Point" in repr(shown["p"])
    assert shown["n"] == 1
    assert shown["x"] == (1, None)
