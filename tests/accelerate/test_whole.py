"""A run that Accelerate alone began goes on at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.accelerate.harness import assert_same, batches, make, on_ranks, state_of, train
from zero_ckpt.accelerate import detach
from zero_ckpt.errors import ConfigurationError


def began(root: str, kind: str | None, safe: bool) -> tuple[dict[str, Any], list[float]]:
    """What was saved, and how the run went on."""
    made = make(kind, seed=1)
    train(made, batches(2))
    state = state_of(made)
    detach(made[0]).save_state(root, safe_serialization=safe)
    return state, train(made, batches(2, 2))


def goes_on(root: str, stage: int) -> tuple[dict[str, Any], list[float]]:
    made = make(stage, seed=2)
    assert made[0].load_state(root) is None
    state = state_of(made)
    losses = train(made, batches(2, 2))
    made[0].save_state(f"{root}/ours")
    return state, losses


@pytest.mark.parametrize(
    ("stage", "world_size", "safe"), [(1, 2, True), (2, 2, True), (3, 2, False), (3, 1, True)]
)
def test_a_folder_of_accelerates_loads_at_every_stage(
    stage: int, world_size: int, safe: bool, tmp_path: Path
) -> None:
    before = on_ranks(began, world_size, str(tmp_path), None, safe)
    after = on_ranks(goes_on, world_size, str(tmp_path), stage)
    for (saved, expected), (loaded, losses) in zip(before, after, strict=True):
        assert_same(saved["weights"], loaded["weights"])
        assert_same(saved["optimizer"], loaded["optimizer"])
        assert saved["scheduler"] == loaded["scheduler"]
        torch.testing.assert_close(losses, expected)
    assert (tmp_path / "ours" / "global_step4").is_dir()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_the_wrapper_around_the_model_does_not_matter(
    before: int, after: int, tmp_path: Path
) -> None:
    """Of several processes Accelerate writes the names that DistributedDataParallel gives."""
    saved = on_ranks(began, before, str(tmp_path), None, True)[0][0]
    for loaded, _ in on_ranks(goes_on, after, str(tmp_path), 3):
        assert_same({key: saved["weights"][key] for key in loaded["weights"]}, loaded["weights"])
        assert_same(saved["optimizer"], loaded["optimizer"])


def refused(root: str) -> None:
    made = make(2)
    with pytest.raises(ConfigurationError, match=r"FSDP plugin.*stage=None, save_state\(\)"):
        made[0].load_state(root)


def test_what_its_fsdp_wrote_is_refused_with_the_way(tmp_path: Path) -> None:
    on_ranks(began, 2, str(tmp_path), "fsdp2", True)
    on_ranks(refused, 2, str(tmp_path))
