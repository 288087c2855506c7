"""What goes wrong in DeepSpeed and in no other test of ours: see docs/guides/coming-from-deepspeed.md."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.contract.models import STAGES, Net, shard, train, weights
from tests.interop.cases import Case
from tests.interop.models import MODELS
from tests.workers import run_ranks
from zero_ckpt import (
    Checkpointer,
    get_fp32_state_dict_from_zero_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import DisagreementError, SaveError
from zero_ckpt.interop.universal import convert_to_universal
from zero_ckpt.testing import FaultyStorage, fail_at

WORLD = 2


# `latest` and files that lie there


def _full_disk(root: str) -> None:
    """Rank 1 has no room for the second save."""
    model, optimizer = shard(3)
    with Checkpointer(model, optimizer) as good:
        good.save_checkpoint(root, "good")
    hook = fail_at(0, errno.ENOSPC) if dist.get_rank() else lambda _: None
    storage = FaultyStorage(LocalStorage(), hook, names=["write"])
    bad = Checkpointer(model, optimizer, storage=storage)
    with bad, pytest.raises(SaveError, match=r"rank 1: .*No space left"):
        bad.save_checkpoint(root, "bad")
    assert load_checkpoint(root, model, optimizer).path == f"{root}/good"
    assert save_checkpoint(root, model, optimizer, tag="next", step=2).committed


def test_latest_never_names_a_checkpoint_that_some_rank_did_not_finish(tmp_path: Path) -> None:
    run_ranks(_full_disk, WORLD, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["good", "latest", "next"]


def _save_over(directory: str, seed: int) -> dict[str, torch.Tensor]:
    model, optimizer = shard(3, seed)
    train(model, optimizer)
    save_checkpoint(directory, model, optimizer, tag="same", step=seed)
    return weights(model)


def _load_over(directory: str) -> dict[str, torch.Tensor]:
    model, optimizer = shard(2, seed=9)
    with Checkpointer(model, optimizer, rng=False) as checkpointer:
        checkpointer.load_checkpoint(directory, "same")
    return weights(model)


def test_a_smaller_run_that_saves_to_the_same_tag_leaves_nothing_of_the_larger(
    tmp_path: Path,
) -> None:
    run_ranks(_save_over, 3, str(tmp_path), 1)
    expected = run_ranks(_save_over, 2, str(tmp_path), 2)[0]
    assert not [name for name in os.listdir(tmp_path / "same") if "-of-00003" in name]
    for found in run_ranks(_load_over, 3, str(tmp_path)):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    collapsed = get_fp32_state_dict_from_zero_checkpoint(tmp_path, "same")
    assert all(torch.equal(collapsed[name], value) for name, value in expected.items())


def _one_rank_sees_nothing(root: str) -> str:
    """As without a shared file system: each rank has a directory of its own under one name."""
    model, _ = shard(1)
    here = f"{root}/node{dist.get_rank()}"
    os.makedirs(here, exist_ok=True)
    seen = _Elsewhere(LocalStorage(), root, here)
    checkpointer = Checkpointer(model, storage=seen)
    with checkpointer, pytest.raises(DisagreementError) as caught:
        checkpointer.load_checkpoint(root, missing_ok=True)
    return str(caught.value)


class _Elsewhere(FaultyStorage):
    """Shows `there` in the place of `root`."""

    def __init__(self, inner: LocalStorage, root: str, there: str) -> None:
        super().__init__(inner, names=[])
        self._root, self._there, self._disk = root, there, inner

    def _at(self, path: str) -> str:
        return path.replace(self._root, self._there, 1)

    def get(self, path: str, limit: int) -> bytes:
        return self._disk.get(self._at(path), limit)

    def list(self, path: str) -> Any:
        return self._disk.list(self._at(path))

    def open(self, path: str) -> Any:
        return self._disk.open(self._at(path))


def test_one_rank_never_resumes_while_another_starts_anew(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "node0", Net(), tag="t", step=1)
    told = run_ranks(_one_rank_sees_nothing, WORLD, str(tmp_path))
    assert told[0] == told[1]
    assert "rank 0 has found a checkpoint in" in told[0]
    assert "but rank 1: " in told[0]
    assert "Every rank must see the same directory" in told[0]


@pytest.mark.parametrize("engine", ["sync", "async"])
def test_every_save_commits_and_moves_latest_the_last_one_too(engine: str, tmp_path: Path) -> None:
    """DataStates' engine has no commit; DeepSpeed's decoupled one leaves it to a step that may not come."""
    run_ranks(_save_often, WORLD, str(tmp_path), engine)
    assert (tmp_path / "latest").read_text().strip() == "last"
    assert load_checkpoint(tmp_path, Net(), load_module_only=True).path == str(tmp_path / "last")


def _save_often(root: str, engine: str) -> None:
    model, optimizer = shard(3)
    with Checkpointer(model, optimizer, engine=engine) as checkpointer:
        for tag in ("first", "second"):
            checkpointer.save_checkpoint(root, tag, step=1)
            checkpointer.wait()
            assert load_checkpoint(root, model, optimizer).path == f"{root}/{tag}"
        checkpointer.save_checkpoint(root, "last", step=1)


# Gradient clipping


def test_deepspeed_s_clip_value_goes_nowhere(deepspeed_cases: Path) -> None:
    case = Case(deepspeed_cases / "base_z2_w2_fp32")
    file = next((case.directory / case.tag).glob("*zero_pp_rank_0*optim_states.pt"))
    assert b"clip_grad" in file.read_bytes()
    model = MODELS[case.meta["model"]]()
    optimizer = torch.optim.AdamW(model.parameters())
    options = set(optimizer.param_groups[0])
    result = load_checkpoint(case.directory, model, optimizer, tag=case.tag)
    assert optimizer.state
    assert result.client_state in (None, {})
    assert set(optimizer.param_groups[0]) == options
    assert not [name for name in vars(optimizer) if "clip" in name]


# A model without an optimizer, and a job that has not stepped


def _without_optimizer(directory: str, stage: int) -> None:
    model, _ = shard(stage)
    expected = weights(model)
    with Checkpointer(model) as checkpointer:
        checkpointer.save_checkpoint(f"{directory}/{stage}", step=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        checkpointer.load_checkpoint(f"{directory}/{stage}")
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())


def test_a_model_alone_is_saved_and_loaded_at_every_stage(tmp_path: Path) -> None:
    for stage in STAGES:
        run_ranks(_without_optimizer, WORLD, str(tmp_path), stage)


def _before_any_step(root: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for stage in STAGES:
        model, optimizer = shard(stage)
        found.append(weights(model))
        with Checkpointer(model, optimizer) as checkpointer:
            checkpointer.save_checkpoint(f"{root}/{stage}", "t", step=0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            checkpointer.load_checkpoint(f"{root}/{stage}")
        assert all(torch.equal(v, found[-1][name]) for name, v in weights(model).items())
        train(model, optimizer)
    return found


def test_a_job_that_has_not_stepped_is_saved_loaded_and_converted_at_every_stage(
    tmp_path: Path,
) -> None:
    for stage, expected in enumerate(run_ranks(_before_any_step, WORLD, str(tmp_path))[0]):
        convert_to_universal(tmp_path / str(stage), tmp_path / f"universal{stage}")
        found = get_fp32_state_dict_from_zero_checkpoint(tmp_path / f"universal{stage}")
        assert all(torch.equal(found[name], value) for name, value in expected.items())


# DeepSpeed's own files: what its universal load leaves out, or takes though it was told not to


def _load_universal(directory: str, tag: str, model: str) -> tuple[Any, ...]:
    net = MODELS[model]()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 7.0)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.5)
    options: list[dict[str, bool]] = [{"load_optimizer_states": False}, {"load_module_only": True}]
    with Checkpointer(net, optimizer) as checkpointer:
        for option in options:
            checkpointer.load_checkpoint(directory, tag, **option)
            assert not optimizer.state
            assert optimizer.param_groups[0]["lr"] == 0.5
        checkpointer.load_checkpoint(directory, tag)
    return weights(net), len(optimizer.state)


def test_frozen_weights_and_buffers_of_a_universal_checkpoint_arrive_and_options_are_heeded(
    deepspeed_cases: Path, tmp_path: Path
) -> None:
    case = Case(deepspeed_cases / "universal_frozen_z2_w2")
    directory = Path(shutil.copytree(case.directory, tmp_path / "copy"))
    args = (str(directory), case.tags[-1], case.meta["model"])
    for found, states in run_ranks(_load_universal, WORLD, *args):
        assert states > 0
        for name, value in case.weights.items():
            assert torch.equal(found[name], value), name
