"""Pickles opened without running them: what plain ones hold arrives, attacks and damage are refused by name."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interop.writer import Run, edit, write
from zero_ckpt import get_fp32_state_dict_from_zero_checkpoint, load_checkpoint
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import CorruptCheckpointError, UnsafeObjectError, ZeroCkptError
from zero_ckpt.interop.deepspeed.pickle_reader import load_pickle
from zero_ckpt.interop.deepspeed.plain import CONSTRUCTORS
from zero_ckpt.interop.deepspeed.records import PickleError, Record

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 80), 1 << 80)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.text(max_size=2))
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict)
        | st.sets(st.integers(), max_size=4)
        | st.frozensets(st.text(max_size=2), max_size=4)
    ),
    max_leaves=20,
)


def opened(data: bytes) -> Any:
    def refuse(_: Any) -> Any:
        raise PickleError("no storages here")

    return load_pickle(data, CONSTRUCTORS, refuse)[0]


@given(tree=TREES, protocol=st.sampled_from([2, 3, 4, 5]))
def test_plain_values_arrive_as_they_were(tree: Any, protocol: int) -> None:
    found = opened(pickle.dumps(tree, protocol=protocol))
    assert found == tree
    assert type(found) is type(tree)


class Reduced:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Reduced(os.system, "touch hacked"),
        Reduced(eval, "1"),
        Reduced(exec, "1"),
        Reduced(__import__, "os"),
        Reduced(subprocess.Popen, ["true"]),
        [1, {"deep": Reduced(os.system, "touch hacked")}],
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_that_only_an_attack_makes_is_refused_by_name(attack: Any, protocol: int) -> None:
    with pytest.raises(UnsafeObjectError, match=r"the pickle calls '.*Nothing was run"):
        opened(pickle.dumps(attack, protocol=protocol))


@pytest.mark.parametrize("kind", [set, frozenset, collections.Counter, bytearray, bytes, list])
def test_a_container_of_a_range_is_never_filled(kind: Any) -> None:
    endless = 1 << 50 if kind in (bytearray, bytes) else range(1 << 50)
    assert isinstance(opened(pickle.dumps(Reduced(kind, endless))), Record)


class Meter:
    def __init__(self) -> None:
        self.total = 3.5


def test_an_object_of_another_class_becomes_an_inert_record() -> None:
    found = opened(pickle.dumps({"meter": Meter()}, protocol=2))["meter"]
    assert isinstance(found, Record)
    assert found.kind.name == "Meter"
    assert found.get("total") == 3.5


@settings(max_examples=300)
@given(tree=TREES, data=st.data())
def test_damage_is_an_error_of_ours_or_another_value_never_a_crash(
    tree: Any, data: st.DataObject
) -> None:
    pickled = bytearray(pickle.dumps(tree, protocol=data.draw(st.sampled_from([2, 4]))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(pickled) - 1))
        pickled[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PickleError, UnsafeObjectError):
        opened(bytes(pickled[: data.draw(st.integers(1, len(pickled)))]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x01N.",
        b"\x80\x02]r\xff\xff\xff\x7f",  # a memo of 2**31 entries
        b"\x80\x02X\xff\xff\xff\xff",  # a text of 4 GB
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes beyond any memory
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2 GB
        b"\x80\x02(.",
        b"\x80\x02h\x05.",
        b"\x80\x02i",
    ],
)
def test_claims_beyond_the_data_are_errors_and_take_no_memory(data: bytes) -> None:
    with pytest.raises(PickleError):
        opened(data)


def a_run() -> Run:
    return Run([{"weight": torch.randn(4, 3)}], {}, world=2, stage=2, step=None)


def attacked(folder: Path, key: str, value: Any) -> Path:
    write(a_run(), folder / "tag")

    def insert(tree: dict[str, Any]) -> None:
        tree[key] = value

    edit(folder / "tag" / "mp_rank_00_model_states.pt", insert)
    return folder / "tag"


def test_an_attack_anywhere_in_a_file_refuses_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = attacked(tmp_path, "client", Reduced(os.system, "touch hacked"))
    for door in (get_fp32_state_dict_from_zero_checkpoint, open_checkpoint):
        with pytest.raises(
            UnsafeObjectError, match=r"mp_rank_00_model_states\.pt: .*'posix\.system'"
        ):
            door(folder)
    with pytest.raises(UnsafeObjectError):
        load_checkpoint(folder, torch.nn.Linear(3, 4, bias=False), weights_only=False)
    assert not Path("hacked").exists()


def test_client_state_of_a_user_class_never_keeps_the_weights_back(tmp_path: Path) -> None:
    folder = attacked(tmp_path, "meter", Meter())
    assert set(get_fp32_state_dict_from_zero_checkpoint(folder)) == {"weight"}
    model = torch.nn.Linear(3, 4, bias=False)
    with pytest.raises(UnsafeObjectError, match=r"'client_state/meter' is a pickled .*Meter"):
        load_checkpoint(folder, model, load_module_only=True)
    _, client_state = load_checkpoint(folder, model, load_module_only=True, weights_only=False)
    assert client_state["meter"].total == 3.5


def test_what_stands_in_a_tensor_s_place_is_named(tmp_path: Path) -> None:
    write(a_run(), tmp_path / "tag")

    def replace(tree: dict[str, Any]) -> None:
        tree["module"]["weight"] = Meter()

    edit(tmp_path / "tag" / "mp_rank_00_model_states.pt", replace)
    with pytest.raises(
        CorruptCheckpointError, match=r"'weight': a tensor expected, '.*Meter' found"
    ):
        open_checkpoint(tmp_path / "tag")


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"]
)
def test_a_truncated_file_is_named_wherever_it_ends(name: str, tmp_path: Path) -> None:
    write(a_run(), tmp_path / "tag")
    path = tmp_path / "tag" / name
    data = path.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptCheckpointError, match=name):
            open_checkpoint(tmp_path / "tag")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_crash_the_reader(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "tag"
    write(a_run(), folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(ZeroCkptError):
        get_fp32_state_dict_from_zero_checkpoint(folder)


def test_flipped_data_is_found_by_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from zero_ckpt.cli import main

    write(a_run(), tmp_path / "tag")
    path = tmp_path / "tag" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    at = data.index(a_run_marker(path))
    data[at] ^= 1
    path.write_bytes(bytes(data))
    assert main(["verify", str(tmp_path / "tag")]) == 1
    assert "CRC-32" in capsys.readouterr().out


def a_run_marker(path: Path) -> bytes:
    """The first bytes of the partition of masters."""
    from tests.interop.writer import deepspeed_classes

    with deepspeed_classes():
        tree = torch.load(path, weights_only=False)
    flat = tree["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
    return flat.numpy().tobytes()[:16]
