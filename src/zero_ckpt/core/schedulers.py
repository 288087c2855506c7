"""Learning-rate schedulers on load: by name, as far as both sides have them.

A scheduler that only one side has gives a notice and no error: weights and moments are right without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["plan_schedulers", "scheduler_notices", "with_rates_of"]

_NEW_RUNS = ("base_lrs", "_last_lr")
"""Entries of a scheduler's state that hold learning rates, and not its place in the schedule."""


def scheduler_notices(path: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """A sentence for the schedulers that only the job has, and one for those that only the checkpoint at `path` has."""
    notices = []
    if new := sorted(live.keys() - saved.keys()):
        notices.append(
            f"{path} holds no state for {_shown(new)} of the job: it begins its schedule anew"
        )
    if gone := sorted(saved.keys() - live.keys()):
        notices.append(f"{path} holds the state of {_shown(gone)} that the job has not: it is left")
    return notices


def _shown(names: list[str]) -> str:
    """The schedulers by name; a single one is called ""."""
    if names == [""]:
        return "the LR scheduler"
    return "the LR schedulers " + ", ".join(f"'{name}'" for name in names)


def plan_schedulers(
    live: Mapping[str, Any], saved: Mapping[str, Any], *, keep_rates: bool = False
) -> Callable[[], None]:
    """A function that gives its saved state to every scheduler that the job and the checkpoint both have.

    `keep_rates`: each goes to its saved place in the schedule, and keeps the base learning rates of this run.
    """
    both = [(scheduler, saved[name]) for name, scheduler in live.items() if name in saved]

    def install() -> None:
        for scheduler, state in both:
            own = with_rates_of(state, scheduler.state_dict()) if keep_rates else state
            scheduler.load_state_dict(own)

    return install


def with_rates_of(saved: Any, live: Any) -> Any:
    """A scheduler's `saved` state with the learning rates of another's, `live`.

    Both may hold schedulers in lists (`SequentialLR`).
    """
    if isinstance(saved, dict) and isinstance(live, dict):
        return {
            key: live[key]
            if key in _NEW_RUNS and key in live
            else with_rates_of(value, live.get(key))
            for key, value in saved.items()
        }
    if isinstance(saved, list) and isinstance(live, list) and len(saved) == len(live):
        return [with_rates_of(a, b) for a, b in zip(saved, live, strict=True)]
    return saved
