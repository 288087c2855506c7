"""DeepSpeed's name for an export, with DeepSpeed's arguments."""

from __future__ import annotations

import os

from zero_ckpt.fp32.export import export_fp32

__all__ = ["convert_zero_checkpoint_to_fp32_state_dict"]


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | int | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write `model.safetensors` or `pytorch_model.bin`, or their shards, into `output_dir`.

    Arguments as of `deepspeed.utils.zero_to_fp32`, and their defaults; raises as `export_fp32` does.
    """
    export_fp32(
        checkpoint_dir,
        output_dir,
        tag,
        format="safetensors" if safe_serialization else "bin",
        max_shard_size=max_shard_size,
        exclude_frozen_parameters=exclude_frozen_parameters,
    )
