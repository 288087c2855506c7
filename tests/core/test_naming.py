"""Names in a checkpoint: without what wrappers add, experts by their numbers in the layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from zero_ckpt.core.experts import ExpertNotes, Share, merged_notes, set_share
from zero_ckpt.core.layout import Layout, Table
from zero_ckpt.core.naming import is_elsewhere, naming_of, parameter_names, split_expert
from zero_ckpt.core.state import capture_model
from zero_ckpt.errors import StateMismatchError


def local(first: int = 10, count: int = 2, total: int = 20) -> nn.Module:
    """A rank's experts 10 and 11, inside wrappers."""
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(count))
    set_share(block.experts, Share(first, count, total))
    block.experts[1] = torch.compile(block.experts[1])
    net = nn.Module()
    net.blocks = nn.ModuleList([checkpoint_wrapper(block)])
    return net


NAMES = ["blocks.0.experts.10.weight", "blocks.0.experts.11.weight"]


def test_experts_inside_wrappers_are_called_by_their_numbers() -> None:
    net = local()
    assert list(capture_model(net).tensors) == NAMES
    assert list(parameter_names(net).values()) == NAMES


def test_copies_and_pickles_are_called_alike() -> None:
    net = nn.ModuleList([nn.Linear(1, 1, bias=False)])
    set_share(net, Share(3, 1, 4))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert list(capture_model(other).tensors) == ["3.weight"]


def test_a_list_at_the_root_and_names_that_only_look_alike() -> None:
    experts = {"": Share(0, 1, 2), "moe.": Share(0, 1, 2)}
    assert split_expert("1.weight", experts) == ("", 1, ".weight")
    assert split_expert("gate.1.weight", experts) is None
    assert split_expert("moe.gate.1", {"moe.": Share(0, 1, 2)}) is None
    assert split_expert("other.moe.1", {"moe.": Share(0, 1, 2)}) is None


@pytest.mark.parametrize(
    ("key", "expected"), [("9", True), ("10", False), ("11", False), ("19", True), ("20", False)]
)
def test_experts_of_other_ranks_are_known_and_no_more(key: str, expected: bool) -> None:
    experts = naming_of(local()).experts
    assert is_elsewhere(f"blocks.0.experts.{key}.weight", experts) == expected


def test_the_same_place_on_all_ranks() -> None:
    names = parameter_names(local(first=2, count=2, total=6))
    assert names.on_all_ranks("blocks.0.experts.3.weight") == [
        f"blocks.0.experts.{n}.weight" for n in (1, 3, 5)
    ]
    assert names.on_all_ranks("head.weight") == ["head.weight"]


def table(share: Share | None, **notes: list[str]) -> Table:
    known = ExpertNotes(shares={"moe.": share} if share else {}, **notes)  # type: ignore[arg-type]
    found = Table(experts=known)
    numbers = share.own if share else [0]
    found.roles["model"] = {f"moe.{n}.w": Layout("F32", (1,)) for n in numbers}
    return Table.from_bytes(found.to_bytes())


def test_what_ranks_know_of_their_experts_is_put_together() -> None:
    tables = [table(Share(0, 1, 2), frozen=["moe.0.w"]), table(Share(1, 1, 2), buffers=["moe.1.b"])]
    merged = merged_notes(tables, [[0, 2], [1, 3]])
    assert (merged.frozen, merged.buffers) == (["moe.0.w"], ["moe.1.b"])


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([Share(0, 1, 3), Share(2, 1, 3)], r"'moe' has 3 experts, of which no rank holds \[1\]"),
        ([Share(0, 1, 2), Share(3, 3, 6)], "different numbers of experts .*: 2 on rank 0, 6 on"),
        ([Share(0, 1, 1), None], "declared list of experts on some ranks, and not on rank 1"),
    ],
)
def test_experts_that_do_not_fit_together_are_refused(
    shares: list[Share | None], expected: str
) -> None:
    with pytest.raises(StateMismatchError, match=expected):
        merged_notes([table(share) for share in shares], [[0], [1]])
