"""Which tensors go out, under which names, in which dtype."""

from __future__ import annotations

import pytest

from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.planner import Placed
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.fp32.selection import select


def manifest(**dtypes: str) -> Manifest:
    model = {key: Placed(dtype, (2,), ()) for key, dtype in dtypes.items()}
    return Manifest(
        tag="t",
        step=0,
        world_size=1,
        zero_stage=0,
        tensors={"model": model, "optim": {}, "state": {}},
    )


ALL = {"a": "F64", "b": "F32", "c": "F16", "d": "BF16", "e": "F8_E5M2", "f": "I64", "g": "C64"}


@pytest.mark.parametrize(
    ("dtype", "written"),
    [
        ("fp32", ["F64", "F32", "F32", "F32", "F32", "I64", "C64"]),
        ("bf16", ["BF16", "BF16", "BF16", "BF16", "BF16", "I64", "C64"]),
        ("fp16", ["F16", "F16", "F16", "F16", "F16", "I64", "C64"]),
        ("keep", list(ALL.values())),
    ],
)
def test_only_floating_parameters_change_their_dtype(dtype: str, written: list[str]) -> None:
    assert [t.dtype for t in select(manifest(**ALL), dtype=dtype)] == written


def test_buffers_keep_their_dtype() -> None:
    given = manifest(weight="F16", mean="F16")
    given.buffers = ["mean"]
    assert {t.key: t.dtype for t in select(given)} == {"weight": "F32", "mean": "F16"}


def test_tied_names_share_a_tensor_and_frozen_ones_can_be_left_out() -> None:
    given = manifest(a="F32", b="F32")
    given.aliases, given.frozen = {"a2": "a", "b2": "b"}, ["b"]
    assert [t.names for t in select(given)] == [("a", "a2"), ("b", "b2")]
    assert [t.names for t in select(given, exclude_frozen_parameters=True)] == [("a", "a2")]


def test_a_prefix_is_stripped_where_it_stands() -> None:
    given = manifest(**{"model.a": "F32", "other": "F32"})
    given.aliases = {"model.tied": "model.a"}
    chosen = select(given, strip_prefix="model.")
    assert [t.names for t in chosen] == [("a", "tied"), ("other",)]
    assert [t.key for t in chosen] == ["model.a", "other"]


def test_a_prefix_that_no_name_has_or_that_makes_names_equal_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'net\.'; names are like \['model\.a'"):
        select(manifest(**{"model.a": "F32"}), strip_prefix="net.")
    with pytest.raises(ConfigurationError, match=r"one name: \['a'\]"):
        select(manifest(**{"model.a": "F32", "a": "F32"}), strip_prefix="model.")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="fp32, bf16, fp16, keep; found 'int8'"):
        select(manifest(a="F32"), dtype="int8")
