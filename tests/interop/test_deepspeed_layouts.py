"""Layouts beyond the cases that we have: any shapes, ranks, groups, paddings and switches, read back bitwise."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interop.writer import Run, Tensors, edit, write
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import CorruptCheckpointError

SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
STATES = st.sampled_from([(), ("momentum_buffer",), ("exp_avg", "exp_avg_sq")])


@st.composite
def runs(draw: st.DrawFn) -> Run:
    sizes = draw(st.lists(st.lists(SHAPES, min_size=1, max_size=6), min_size=1, max_size=3))
    count = iter(range(1, 1 << 20))

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        numel = torch.Size(shape).numel()
        return torch.arange(numel, dtype=torch.float32).view(shape) + 1000.0 * next(count)

    groups = [
        {f"g{g}.p{p}": tensor(s) for p, s in enumerate(group)} for g, group in enumerate(sizes)
    ]
    names = {name: value.shape for group in groups for name, value in group.items()}
    keys = draw(STATES)
    stage = draw(st.sampled_from([1, 2, 3]))
    return Run(
        groups=groups,
        states={key: {name: tensor(shape) for name, shape in names.items()} for key in keys},
        world=draw(st.integers(1, 8)),
        stage=stage,
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        buffers={"running": torch.arange(3), "mean": torch.rand(2, 2)},
        frozen={f"frozen{i}": tensor(s) for i, s in enumerate(draw(st.lists(SHAPES, max_size=2)))},
        aligned=draw(st.booleans()),
        round_robin=draw(st.booleans()),
        keeps_padding=stage == 1 and draw(st.booleans()),
        sub_group_size=draw(st.sampled_from([1, 7, 40, 1 << 40])),
        step=3.0 if keys == ("exp_avg", "exp_avg_sq") else None,
    )


def expected_model(run: Run) -> Tensors:
    frozen = {name: value.to(run.dtype) for name, value in run.frozen.items()}
    return {**frozen, **run.masters, **run.buffers}


def assert_read(run: Run, folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        expected = expected_model(run)
        assert set(checkpoint.keys("model")) == set(expected)
        for name, value in expected.items():
            found = checkpoint.tensor("model", name)
            assert found.dtype == value.dtype
            assert found.shape == value.shape
            assert torch.equal(found, value), name
        for key, values in run.states.items():
            for name, value in values.items():
                assert torch.equal(checkpoint.tensor("optim", f"{name}/{key}"), value), name
        assert set(checkpoint.manifest.frozen) == set(run.frozen)
        assert set(checkpoint.manifest.buffers) == set(run.buffers)
        groups = checkpoint.objects()["optimizers"][""]["groups"]
        assert [set(group["params"]) for group in groups] == [set(group) for group in run.groups]
        assert [group["options"]["lr"] for group in groups] == [
            pytest.approx(0.1 * (i + 1)) for i in range(len(run.groups))
        ]


@settings(max_examples=60, deadline=None)
@given(run=runs())
def test_every_layout_is_read_back_bitwise(run: Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(run, Path(folder) / "tag")
        assert_read(run, Path(folder) / "tag")


def a_run(stage: int, world: int = 3, **options: object) -> Run:
    groups = [{"a": torch.randn(5, 7), "b": torch.randn(11)}, {"c": torch.randn(3, 2, 2)}]
    states = {
        key: {name: torch.randn(value.shape) for group in groups for name, value in group.items()}
        for key in ("exp_avg", "exp_avg_sq")
    }
    return Run(groups, states, world, stage, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [2, 3])
def test_files_in_torch_s_older_format_are_read(stage: int, tmp_path: Path) -> None:
    run = a_run(stage, buffers={"b0": torch.arange(3, dtype=torch.int8)})
    write(run, tmp_path / "tag", serialization=False)
    assert_read(run, tmp_path / "tag")


@pytest.mark.parametrize("stage", [2, 3])
def test_files_that_a_larger_run_left_behind_are_not_read(stage: int, tmp_path: Path) -> None:
    write(a_run(stage, world=4), tmp_path / "tag")
    run = a_run(stage, world=2)
    write(run, tmp_path / "tag")
    assert_read(run, tmp_path / "tag")


def test_of_two_precisions_in_one_folder_the_model_files_counts(tmp_path: Path) -> None:
    write(a_run(2, dtype=torch.bfloat16), tmp_path / "tag")
    run = a_run(2)
    write(run, tmp_path / "tag")
    assert_read(run, tmp_path / "tag")


def test_partitions_of_an_earlier_save_are_not_read_at_stage_0(tmp_path: Path) -> None:
    write(a_run(2), tmp_path / "tag")
    weight = torch.randn(3, 2)
    state = {0: {"momentum_buffer": torch.randn(3, 2)}}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}
    tree = {
        "module": {"w": weight},
        "buffer_names": [],
        "param_shapes": None,
        "optimizer": optimizer,
    }
    torch.save(tree, tmp_path / "tag" / "mp_rank_00_model_states.pt")
    with open_checkpoint(tmp_path / "tag") as checkpoint:
        assert checkpoint.keys("model") == ["w"]
        assert torch.equal(checkpoint.tensor("model", "w"), weight)
        moments = checkpoint.tensor("optim", "w/momentum_buffer")
        assert torch.equal(moments, state[0]["momentum_buffer"])


def test_two_saves_of_one_step_and_different_stages_are_refused(tmp_path: Path) -> None:
    write(a_run(3), tmp_path / "tag")
    write(a_run(2), tmp_path / "tag")
    with pytest.raises(CorruptCheckpointError, match="two saves with different ZeRO stages"):
        open_checkpoint(tmp_path / "tag")


def test_another_order_than_the_model_file_says_is_refused(tmp_path: Path) -> None:
    """Round-robin order in the partitions, and no word of it."""
    run = a_run(2, round_robin=True)
    run.groups = [
        {"a": torch.randn(4), "b": torch.randn(4), "c": torch.randn(4), "d": torch.randn(4)}
    ]
    run.states = {}
    run.step = None
    write(run, tmp_path / "tag")
    assert_read(run, tmp_path / "tag")

    def forget(tree: dict[str, Any]) -> None:
        tree["ds_config"]["zero_optimization"]["round_robin_gradients"] = False

    edit(tmp_path / "tag" / "mp_rank_00_model_states.pt", forget)
    with pytest.raises(CorruptCheckpointError, match="param_slice_mappings"):
        open_checkpoint(tmp_path / "tag")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_missing_rank_is_named(stage: int, tmp_path: Path) -> None:
    write(a_run(stage), tmp_path / "tag")
    (tmp_path / "tag" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"rank 1.*is missing.*3 data-parallel ranks"):
        open_checkpoint(tmp_path / "tag")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_partition_of_another_save_is_refused(stage: int, tmp_path: Path) -> None:
    write(a_run(stage), tmp_path / "tag")
    other = a_run(stage)
    other.groups = [{"a": torch.randn(5, 9), "b": torch.randn(11)}, {"c": torch.randn(3, 2, 2)}]
    other.states = {}
    write(other, tmp_path / "other")
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "other" / name).replace(tmp_path / "tag" / name)
    with pytest.raises(CorruptCheckpointError, match=r"not of one save|param_slice_mappings"):
        open_checkpoint(tmp_path / "tag")


def test_masters_on_nvme_are_refused_by_name(tmp_path: Path) -> None:
    write(a_run(3), tmp_path / "tag")

    def swap(tree: dict[str, Any]) -> None:
        tree["optimizer_state_dict"]["fp32_flat_groups"] = [torch.empty(0), torch.empty(0)]

    edit(tmp_path / "tag" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", swap)
    with pytest.raises(CorruptCheckpointError, match="swapped out to NVMe"):
        open_checkpoint(tmp_path / "tag")
