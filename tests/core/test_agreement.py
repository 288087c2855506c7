"""What ranks agree on reaches them as it was decided, in few bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zero_ckpt.core.agreement import Agreement

ranks = st.lists(st.integers(0, 40), min_size=1, unique=True).map(sorted)


@given(st.lists(ranks, min_size=1, max_size=4), st.text(), st.integers(1, 9))
def test_an_agreement_comes_back_as_it_was(
    holders: list[list[int]], text: str, generation: int
) -> None:
    agreement = Agreement("/checkpoints", text, generation, holders, text)
    assert Agreement.from_bytes(agreement.to_bytes()) == agreement


def test_an_agreement_does_not_grow_with_the_ranks() -> None:
    def size(world_size: int) -> int:
        stages = [list(range(first, world_size, 4)) for first in range(4)]
        return len(Agreement("/checkpoints", "t", 1, stages).to_bytes())

    assert size(16_384) < size(16) + 32
