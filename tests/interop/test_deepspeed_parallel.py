"""Parallel ranks put together, and parameters without names: right, or refused; never another guess."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.interop.writer import Run, write
from zero_ckpt import get_fp32_state_dict_from_zero_checkpoint
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import StateMismatchError
from zero_ckpt.interop.deepspeed.experts import count_experts, global_name, ranks_of_experts
from zero_ckpt.interop.deepspeed.matching import Ambiguous, match_shapes
from zero_ckpt.interop.deepspeed.pipeline import TIED, stage_names

SHAPES = st.sampled_from([(), (2,), (3,), (2, 2), (2, 3)])


@given(data=st.data())
def test_matching_is_the_truth_or_ambiguous(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(SHAPES, max_size=8))
    homes = [data.draw(st.integers(-1, 2)) for _ in shapes]
    candidates = {f"p{i}": shape for i, shape in enumerate(shapes)}
    truth = [[f"p{i}" for i, home in enumerate(homes) if home == g] for g in range(3)]
    groups: list[list[tuple[int, ...] | None]] = [
        [candidates[name] if data.draw(st.booleans()) else None for name in names]
        for names in truth
    ]
    with contextlib.suppress(Ambiguous):
        assert match_shapes(groups, candidates) == truth


def test_weights_and_biases_in_two_groups_are_told_apart_by_their_shapes() -> None:
    candidates = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (4, 3), "b.bias": (4,)}
    groups: list[list[Any]] = [[(4, 3), (4, 3)], [(4,), (4,)]]
    assert match_shapes(groups, candidates) == [["a.weight", "b.weight"], ["a.bias", "b.bias"]]


def test_equal_shapes_in_two_groups_are_ambiguous() -> None:
    with pytest.raises(Ambiguous, match="shapes alone do not tell"):
        match_shapes([[(4,)], [(4,)]], {"a": (4,), "b": (4,)})


def test_stages_take_consecutive_layers_and_tied_ones_again() -> None:
    names = {"0.emb": (37, 16), "1.w": (4, 4), "2.w": (4, 4), "3.w": (5,)}
    stages: list[list[Any]] = [[(37, 16), (4, 4)], [(37, 16), (4, 4), (5,)]]
    assert stage_names(stages, names) == [
        {"0.emb": (37, 16), "1.w": (4, 4)},
        {"0.emb": (37, 16), "2.w": (4, 4), "3.w": (5,)},
    ]
    assert stage_names([[(37, 16)], [(9, 9)]], names) is None
    twins = {"0.a": (2,), "0.b": (2,), "1.w": (3,)}
    found = stage_names([[(2,), (2,)], [(2,), (3,)]], twins)
    assert found is not None
    assert [name.startswith(TIED) for name in found[1]] == [True, False]


@given(size=st.integers(1, 6), parts=st.integers(1, 6), consecutive=st.booleans())
def test_which_ranks_share_experts_shows_in_their_slices(
    size: int, parts: int, consecutive: bool
) -> None:
    ranks = range(size * parts)
    orders = [rank // size if consecutive else rank % parts for rank in ranks]
    found = dict(ranks_of_experts(size * parts, parts, orders))
    assert sorted(rank for row in found.values() for rank in row) == list(ranks)
    for expert, row in found.items():
        assert len({orders[rank] for rank in row}) == parts
        holders = {rank % size if consecutive else rank // parts for rank in row}
        assert parts == 1 or size == 1 or holders == {expert}


def test_experts_get_global_numbers() -> None:
    names = [f"m.deepspeed_experts.{i}.w" for i in range(3)]
    assert [global_name(n, 2, count_experts(names)) for n in names] == [
        "m.deepspeed_experts.6.w",
        "m.deepspeed_experts.7.w",
        "m.deepspeed_experts.8.w",
    ]


def write_parallel(folder: Path, parts: list[dict[str, torch.Tensor]], info: Any = None) -> Path:
    """A stage 0 checkpoint of tensor-parallel ranks."""
    folder.mkdir()
    for rank, part in enumerate(parts):
        tree = {
            "module": OrderedDict(part),
            "buffer_names": [],
            "optimizer": None,
            "global_steps": 1,
            "dp_world_size": 1,
            "mp_world_size": len(parts),
            "ds_version": "0.19.8",
        }
        if info is not None:
            tree["universal_checkpoint_info"] = info
        torch.save(tree, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


def test_parts_are_joined_by_what_they_show(tmp_path: Path) -> None:
    whole = {
        "up.weight": torch.randn(12, 8),
        "up.bias": torch.randn(12),
        "down.weight": torch.randn(8, 12),
        "norm.weight": torch.randn(8),
    }
    dims = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    parts = [
        {
            name: value.chunk(3, dims[name])[rank].clone() if name in dims else value.clone()
            for name, value in whole.items()
        }
        for rank in range(3)
    ]
    found = get_fp32_state_dict_from_zero_checkpoint(write_parallel(tmp_path / "tag", parts))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_split_that_nothing_tells_is_refused_by_name(tmp_path: Path) -> None:
    parts = [{"mystery": torch.randn(4, 4), "norm": torch.ones(4)} for _ in range(2)]
    with pytest.raises(
        StateMismatchError, match=r"'mystery' of shape .* differs between 2 tensor-parallel"
    ):
        open_checkpoint(write_parallel(tmp_path / "tag", parts))


def test_recorded_patterns_decide(tmp_path: Path) -> None:
    row, fused = torch.randn(4, 8), torch.randn(12, 4)
    vocabulary = torch.randn(8, 4)
    query, key, value = fused.chunk(3)
    parts = [
        {
            "row": row.chunk(2, 1)[rank].clone(),
            "fused": torch.cat([query.chunk(2)[rank], key.chunk(2)[rank], value.chunk(2)[rank]]),
            "same": torch.full((4, 4), float(rank)),
            "words": vocabulary.chunk(2)[rank].clone(),
        }
        for rank in range(2)
    ]
    info = {
        "tp_replicated_parameter_patterns": ["same"],
        "parameter_with_row_parallelism_patterns": ["row"],
        "parameter_with_sub_params": [
            {"patterns": ["fused"], "shape": ((4, 4, 4), -1), "partition_dim": 0}
        ],
        "vocabulary_parameter_patterns": ["words"],
        "original_vocab_size": 7,
    }
    found = get_fp32_state_dict_from_zero_checkpoint(write_parallel(tmp_path / "tag", parts, info))
    assert torch.equal(found["row"], row)
    assert torch.equal(found["fused"], fused)
    assert torch.equal(found["same"], torch.zeros(4, 4))
    assert torch.equal(found["words"], vocabulary[:7])


@pytest.mark.parametrize("flat", [True, False])
def test_stage_0_in_16_bits_gives_the_masters(flat: bool, tmp_path: Path) -> None:
    masters = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    tensors = (
        [torch.cat([m.reshape(-1) for m in masters.values()])] if flat else list(masters.values())
    )
    state = {i: {"step": 4, "exp_avg": t + 1, "exp_avg_sq": t + 2} for i, t in enumerate(tensors)}
    options = {"lr": 0.1, "betas": (0.9, 0.99), "params": list(state)}
    optimizer: dict[str, Any] = {
        "optimizer_state_dict": {"state": state, "param_groups": [options]}
    }
    optimizer["fp32_groups_flat" if flat else "fp32_groups"] = tensors if flat else [tensors]
    tree = {
        "module": OrderedDict((name, value.bfloat16()) for name, value in masters.items()),
        "buffer_names": [],
        "optimizer": optimizer,
        "global_steps": 3,
        "dp_world_size": 2,
        "mp_world_size": 1,
    }
    (tmp_path / "tag").mkdir()
    torch.save(tree, tmp_path / "tag" / "mp_rank_00_model_states.pt")
    with open_checkpoint(tmp_path / "tag") as checkpoint:
        for name, value in masters.items():
            assert torch.equal(checkpoint.tensor("model", name), value)
            assert torch.equal(checkpoint.tensor("optim", f"{name}/exp_avg"), value + 1)
            assert float(checkpoint.tensor("optim", f"{name}/step")) == 4.0


def test_stage_0_without_names_gives_weights_and_refuses_the_state(tmp_path: Path) -> None:
    module = OrderedDict(a=torch.randn(4), b=torch.randn(4))
    groups = [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]
    state = {i: {"momentum_buffer": torch.randn(4)} for i in range(2)}
    tree = {
        "module": module,
        "buffer_names": [],
        "optimizer": {"state": state, "param_groups": groups},
    }
    (tmp_path / "tag").mkdir()
    torch.save(tree, tmp_path / "tag" / "mp_rank_00_model_states.pt")
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "tag")
    assert all(torch.equal(found[name], value) for name, value in module.items())
    with pytest.raises(StateMismatchError, match="load_optimizer_states=False"):
        open_checkpoint(tmp_path / "tag").keys("optim")


def test_a_model_compiled_before_deepspeed_has_plain_names(tmp_path: Path) -> None:
    group = {"_orig_mod.weight": torch.randn(3, 2), "_orig_mod.bias": torch.randn(3)}
    write(Run([group], {}, 2, 2, step=None), tmp_path / "tag")
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "tag")
    assert set(found) == {"weight", "bias"}


def test_strided_weights_and_extra_state_arrive(tmp_path: Path) -> None:
    weight = torch.randn(9, 5).t()
    module = OrderedDict([("w", weight), ("layer._extra_state", {"scale": 3})])
    tree = {"module": module, "buffer_names": [], "optimizer": None}
    (tmp_path / "tag").mkdir()
    torch.save(tree, tmp_path / "tag" / "mp_rank_00_model_states.pt")
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "tag")
    assert torch.equal(found["w"], weight)
    assert found["layer._extra_state"] == {"scale": 3}
