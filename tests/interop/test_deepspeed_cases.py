"""Every checkpoint of DeepSpeed's that we have, against what its run really held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.interop.cases import NAMES, RECORDED_LATER, Case
from zero_ckpt import export_fp32, get_fp32_state_dict_from_zero_checkpoint
from zero_ckpt.core.checkpoint import open_checkpoint


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, deepspeed_cases: Path) -> Case:
    return Case(deepspeed_cases / request.param)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bitwise. Buffers keep their dtype, where DeepSpeed's function makes floats of them."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name].to(value.dtype), value), name


def test_fp32_weights_are_bitwise_those_of_the_run(case: Case) -> None:
    for tag in case.tags:
        assert_equal(get_fp32_state_dict_from_zero_checkpoint(case.directory, tag), case.weights)


def test_lazy_weights_and_a_tag_folder_given_directly_are_the_same(case: Case) -> None:
    found = get_fp32_state_dict_from_zero_checkpoint(case.directory / case.tag, lazy_mode=True)
    assert_equal({name: lazy.contiguous() for name, lazy in found.items()}, case.weights)


def test_exported_file_is_the_same(case: Case, tmp_path: Path) -> None:
    (path,) = export_fp32(case.directory, tmp_path / "out", case.tag)
    assert_equal(load_file(path), case.weights)


def test_optimizer_state_is_bitwise_that_of_the_run(case: Case) -> None:
    expected = case.optimizer
    for tag in case.tags:
        with open_checkpoint(case.directory, tag) as checkpoint:
            stored = set(checkpoint.keys("optim"))
            for name, values in expected["state"].items():
                for parameter, value in values.items():
                    found = checkpoint.tensor("optim", f"{parameter}/{name}")
                    assert found.shape == value.shape, parameter
                    same = torch.equal(found.to(value.dtype), value)
                    assert same != (case.name in RECORDED_LATER), f"{parameter}/{name}"
                    stored.remove(f"{parameter}/{name}")
            assert all(key.endswith("/step") for key in stored)
            steps = {float(checkpoint.tensor("optim", key)) for key in stored}
            assert steps == set(expected.get("step") or steps)


def test_groups_name_exactly_the_parameters_that_were_stepped(case: Case) -> None:
    trainable = case.optimizer.get("trainable")
    with open_checkpoint(case.directory, case.tag) as checkpoint:
        tree = json.loads(checkpoint.shards.get("state", 0).read_entry("objects.json"))
        groups = tree["optimizers"][""]["groups"]
        named = [name for group in groups for name in group["params"]]
        assert len(named) == len(set(named))
        assert all(name in checkpoint.manifest.tensors["model"] for name in named)
        assert trainable is None or set(named) == set(trainable)


def test_buffers_frozen_and_tied_names_are_known(case: Case) -> None:
    expected = case.optimizer
    manifest = open_checkpoint(case.directory, case.tag).manifest
    if "buffers" in expected:
        assert set(manifest.buffers) == set(expected["buffers"]) - manifest.aliases.keys()
    if "frozen" in expected and "excl" not in case.name:
        assert set(manifest.frozen) == set(expected["frozen"])
    if expected.get("shared"):
        assert manifest.aliases == expected["shared"]
    assert manifest.world_size == case.meta["world_size"]
    assert manifest.zero_stage == case.meta["stage"]
