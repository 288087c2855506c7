"""Collapse: sharded weights of any dtype into one full fp32 state dict, in memory, on demand or as files.

    state_dict = get_fp32_state_dict_from_zero_checkpoint("checkpoints")
    export_fp32("checkpoints", "model.safetensors")

Works offline, in one process, whatever the world size was; several ranks may share an export.
"""

from zero_ckpt.fp32.convert import convert_zero_checkpoint_to_fp32_state_dict
from zero_ckpt.fp32.export import export_fp32
from zero_ckpt.fp32.state_dict import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "export_fp32",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
]
