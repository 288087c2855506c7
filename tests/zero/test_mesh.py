"""The mesh of data-parallel ranks, one- and two-dimensional."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.workers import run_ranks
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import make_mesh


def _mesh(sharding_size: int | None) -> tuple[tuple[str, ...] | None, list[list[int]], list[int]]:
    mesh = make_mesh(dist.get_world_size(), sharding_size, "cpu")
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return mesh.mesh_dim_names, mesh.mesh.tolist(), list(coordinate)


@pytest.mark.parametrize("sharding_size", [None, 4])
def test_without_hybrid_sharding_the_mesh_has_one_dimension(sharding_size: int | None) -> None:
    for rank, (names, ranks, coordinate) in enumerate(run_ranks(_mesh, 4, sharding_size)):
        assert (names, ranks, coordinate) == (("shard",), [0, 1, 2, 3], [rank])


def test_hybrid_sharding_groups_consecutive_ranks() -> None:
    for rank, (names, ranks, coordinate) in enumerate(run_ranks(_mesh, 4, 2)):
        assert (names, ranks) == (("replicate", "shard"), [[0, 1], [2, 3]])
        assert coordinate == [rank // 2, rank % 2]


@pytest.mark.parametrize("sharding_size", [0, -2, 4, 12])
def test_a_sharding_size_that_does_not_divide_is_refused(sharding_size: int) -> None:
    message = rf"sharding_size={sharding_size} must divide the world size 6.*1, 2, 3, 6\."
    with pytest.raises(ConfigurationError, match=message):
        make_mesh(6, sharding_size, "cpu")
