"""The parts of Lightning's checkpoint dict that a resume was not asked for, taken out before Lightning sees it.

Lightning leaves alone what it finds empty or missing. Entries that it insists on are emptied, the others removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zero_ckpt.core.binding import named
from zero_ckpt.core.load_plan import Wanted
from zero_ckpt.core.schedulers import scheduler_notices, with_rates_of

__all__ = ["PER_RANK", "follow_schedules", "leave_out"]

PER_RANK = "per_rank_client_state"
"""The entry of the dict in which each rank's hooks keep what is that rank's alone."""


def leave_out(content: dict[str, Any], wanted: Wanted, parts: Iterable[str]) -> None:
    """Empty what `wanted` does not ask for. `parts`: entries of the trainer's own parts, by their class names."""
    if not wanted.optimizers:
        content["optimizer_states"] = []
    if not wanted.schedulers:
        content["lr_schedulers"] = []
    if wanted.load_module_only:
        for name in ("loops", "callbacks", *parts):
            content.pop(name, None)
        content |= {"epoch": 0, "global_step": 0}


def follow_schedules(
    content: dict[str, Any], schedulers: list[Any], wanted: Wanted, path: str
) -> list[str]:
    """Adapt `lr_schedulers`, which Lightning then gives to the run's schedulers in their order. Returns notices."""
    saved = content.get("lr_schedulers", [])
    if not wanted.schedulers or not isinstance(saved, list):
        return []
    if wanted.override_hyperparameters:
        live = [scheduler.state_dict() for scheduler in schedulers]
        pairs = zip(saved, live, strict=False)
        content["lr_schedulers"] = [with_rates_of(state, own) for state, own in pairs]
    return scheduler_notices(path, named(schedulers, "schedulers"), named(saved, "schedulers"))
