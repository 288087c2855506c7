"""The same arguments through an attached accelerator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.accelerate.harness import batches, make, on_ranks, state_of, train
from tests.told import told_once, warned
from zero_ckpt.accelerate.base import prepared_model
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import CheckpointNotFoundError, DisagreementError

WORLD = 2
KINDS = [0, 1, 2, 3, "fsdp2"]


def _frozen_and_states(directory: str, kind: Any) -> None:
    rank = dist.get_rank()
    made = make(kind)
    accelerator = made[0]
    train(made, batches(2))
    accelerator.save_state(
        directory,
        client_state={"accelerate": {"step": 99}, "rng": 1},
        per_rank_client_state={"rank": rank, "rng": [rank]},
        exclude_frozen_parameters=True,
    )
    assert open_checkpoint(directory).manifest.excluded == ["shift"]
    again = make(kind, seed=1)
    fresh = again[0]
    with torch.no_grad():
        prepared_model(again[1]).get_parameter("shift").fill_(7)
    assert fresh.load_state(directory) == {"accelerate": {"step": 99}, "rng": 1}
    result = fresh.zero_loaded
    assert result.path == f"{directory}/global_step2"
    assert result.per_rank_client_state == {"rank": rank, "rng": [rank]}
    assert result.report.excluded == ("shift",)
    loaded, saved = state_of(again)["weights"], state_of(made)["weights"]
    assert loaded.pop("shift").tolist() == [7, 7, 7]
    assert all(torch.equal(value, saved[name]) for name, value in loaded.items())


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_stay_out_and_each_rank_gets_its_own_state(
    kind: Any, tmp_path: Path
) -> None:
    on_ranks(_frozen_and_states, WORLD, str(tmp_path), kind)


def _places(root: str, mode: str, what: str) -> tuple[str, list[str]]:
    rank = dist.get_rank()
    accelerator, *_ = make(1, tag_validation=mode)
    directory = f"{root}/dir{rank}" if what == "directory" else f"{root}/dir0"
    tag = f"tag{rank}" if what == "tag" else "tag0"
    if mode == "fail":
        with pytest.raises(DisagreementError, match="ranks were given different") as caught:
            accelerator.save_state(directory, tag=tag)
        return str(caught.value), []
    path, texts = warned(accelerator.save_state, directory, tag=tag)
    return str(path), texts


@pytest.mark.parametrize("what", ["tag", "directory"])
@pytest.mark.parametrize("mode", ["warn", "fail"])
def test_different_places_are_rank_0s_or_refused_before_anything_is_made(
    mode: str, what: str, tmp_path: Path
) -> None:
    found = on_ranks(_places, WORLD, str(tmp_path), mode, what)
    if mode == "fail":
        assert found[0] == found[1]
        assert os.listdir(tmp_path) == []
        return
    assert os.listdir(tmp_path) == ["dir0"]
    assert sorted(os.listdir(tmp_path / "dir0")) == ["latest", "tag0"]
    assert [path for path, _ in found] == [f"{tmp_path}/dir0"] * WORLD
    (text,) = told_once([texts for _, texts in found])
    assert "All ranks save to rank 0's" in text


class Other(nn.Module):
    """Lacks a layer of `Net`, and has another."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.fresh = nn.Linear(6, 3, bias=False), nn.Linear(2, 2)


def _loads(directory: str) -> None:
    made = make(2)
    accelerator = made[0]
    train(made, batches(1))
    for made_beforehand in ("gone", "."):
        place = f"{directory}/{made_beforehand}"
        result, texts = warned(accelerator.load_state, place, missing_ok=True)
        assert result is None
        told = any(text.startswith("NOTHING WAS LOADED") for text in texts)
        assert told == (dist.get_rank() == 0)
    accelerator.save_state(directory, client_state=[3])
    for missing_ok in (True, False):  # somebody has misspelled it
        with pytest.raises(
            CheckpointNotFoundError, match=r"gone: no such checkpoint; .* has 'glob"
        ):
            accelerator.load_state(directory, tag="gone", missing_ok=missing_ok)
    assert accelerator.zero_loaded is None

    partial = make(3, seed=1, net=Other)
    other = partial[0]
    assert other.load_state(directory, strict=False, load_module_only=True) == [3]
    assert set(other.zero_loaded.report.missing) == {"fresh.weight", "fresh.bias"}
    assert "shift" in other.zero_loaded.report.unexpected
    expected = state_of(made)["weights"]
    assert torch.equal(state_of(partial)["weights"]["head.weight"], expected["head.weight"])

    live = make(3, seed=2)
    fresh, _, new, _ = live
    new.param_groups[0]["lr"] = 0.7
    fresh.load_state(
        directory,
        custom_load_fn=lambda src, dst: dst.load_state_dict(src),
        override_hyperparameters=True,
    )
    assert new.param_groups[0]["lr"] == 0.7
    found = state_of(live)["weights"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_a_load_may_be_asked_for(tmp_path: Path) -> None:
    on_ranks(_loads, WORLD, str(tmp_path))


def _schedulers(directory: str) -> None:
    made = make(3)
    train(made, batches(1))
    made[0].save_state(directory)
    other, *_ = make(3, seed=1)
    other._schedulers.clear()
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match="the LR scheduler that the job has not"):
            other.load_state(directory)
    else:
        other.load_state(directory)


def test_a_scheduler_on_one_side_is_a_warning(tmp_path: Path) -> None:
    on_ranks(_schedulers, WORLD, str(tmp_path))
