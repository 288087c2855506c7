"""Device meshes for sharding: one dimension, or two for hybrid sharding."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zero_ckpt.errors import ConfigurationError

__all__ = ["make_mesh"]

REPLICATE = "replicate"
SHARD = "shard"


def make_mesh(world_size: int, sharding_size: int | None, device_type: str) -> DeviceMesh:
    """The data-parallel mesh over all ranks of the default process group. Collective.

    Shape `(world_size,)` with dimension `shard`; with a `sharding_size` below the world size
    (hybrid sharding), shape `(world_size // sharding_size, sharding_size)` with dimensions
    `replicate`, `shard`: `sharding_size` consecutive ranks hold one copy of the model between them. `device_type`:
    "cpu", "cuda" and so on, where the model is trained.

    Raises `ConfigurationError` when `sharding_size` does not divide `world_size`.
    """
    size = world_size if sharding_size is None else sharding_size
    if size < 1 or world_size % size:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigurationError(
            f"sharding_size={size} must divide the world size {world_size}: hybrid sharding forms "
            "groups of sharding_size ranks, and every rank must be in one. Divisors of "
            f"{world_size}: {', '.join(map(str, divisors))}."
        )
    if size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=(SHARD,))
    shape = (world_size // size, size)
    return init_device_mesh(device_type, shape, mesh_dim_names=(REPLICATE, SHARD))
