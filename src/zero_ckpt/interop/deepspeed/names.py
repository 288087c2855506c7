"""Which file of a tag's folder is what, by its name. Pure.

    mp_rank_00_model_states.pt                      the module of one model-parallel rank (ZeRO stage 0 to 2)
    zero_pp_rank_0_mp_rank_00_model_states.pt       the same of every data-parallel rank (stage 3)
    [bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt   a rank's partition of masters and optimizer state
    layer_00[-model_00]-model_states.pt             a pipeline layer
    layer_0_expert_0_mp_rank_00_model_states.pt     one expert (global number) of a mixture-of-experts layer
    expp_rank_0_mp_rank_00_optim_states.pt          an expert-parallel rank's optimizer (stage 0)
    zero/<parameter>/fp32.pt, exp_avg.pt, ...       a universal checkpoint

Older names: `zero_dp_rank`, no underscore before `optim_states`, `expert_0_mp_rank_00_model_states.pt`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Folder", "is_deepspeed", "read_names"]

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO_MODEL = re.compile(r"(?:bf16_|fp16_)?zero_[pd]p_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"((?:bf16_|fp16_)?)zero_[pd]p_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT_OPTIM = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")

Rank = tuple[int, int]
"""(data-parallel or expert-parallel rank, model-parallel rank)."""


@dataclass(slots=True)
class Folder:
    """Names of a tag's files by what they are.

    `models`: by model-parallel rank. `zero_models`, `expert_optims`: by (rank, model-parallel rank). `optims`: prefix
    (`bf16_` or none) -> by (rank, model-parallel rank). `layers`: by (layer, tensor-parallel rank). `experts`: by
    (layer, expert, model-parallel rank), layer -1 for the older names.
    """

    models: dict[int, str] = field(default_factory=dict)
    zero_models: dict[Rank, str] = field(default_factory=dict)
    optims: dict[str, dict[Rank, str]] = field(default_factory=dict)
    layers: dict[Rank, str] = field(default_factory=dict)
    experts: dict[tuple[int, int, int], str] = field(default_factory=dict)
    expert_optims: dict[Rank, str] = field(default_factory=dict)
    is_universal: bool = False


def is_deepspeed(files: Iterable[str]) -> bool:
    """Whether a folder with these files is one that DeepSpeed saved a tag in."""
    return any(p.fullmatch(name) for name in files for p in (_MODEL, _ZERO_MODEL, _OPTIM))


def read_names(files: Iterable[str], folders: Iterable[str]) -> Folder:
    """`files`, `folders`: names in a tag's folder. Names that DeepSpeed does not give are left out."""
    found = Folder(is_universal="zero" in folders)
    for name in sorted(files):
        _add(found, name)
    return found


def _add(found: Folder, name: str) -> None:
    if match := _MODEL.fullmatch(name):
        found.models[int(match[1])] = name
    elif match := _ZERO_MODEL.fullmatch(name):
        found.zero_models[int(match[1]), int(match[2])] = name
    elif match := _OPTIM.fullmatch(name):
        found.optims.setdefault(match[1], {})[int(match[2]), int(match[3])] = name
    elif match := _LAYER.fullmatch(name):
        found.layers[int(match[1]), int(match[2] or 0)] = name
    elif match := _EXPERT.fullmatch(name):
        layer = -1 if match[1] is None else int(match[1])
        found.experts[layer, int(match[2]), int(match[3])] = name
    elif match := _EXPERT_OPTIM.fullmatch(name):
        found.expert_optims[int(match[1]), int(match[2])] = name
