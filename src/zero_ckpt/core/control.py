"""The control plane: how the ranks of a job agree, vote and learn the outcome. Small messages only.

Nothing here is a collective of a process group: a meeting may be held on any thread and in any order with training
traffic, a rank that never comes is named instead of hanging the others, and a failed meeting leaves nothing behind that
could disturb the next one.

A rank counts as lost when it has died on this host, or has neither arrived nor made progress (`beat`) for `timeout`
seconds. So the time limit bounds silence, not the length of a save on a slow disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

from zero_ckpt.core.consequences import shared_error
from zero_ckpt.core.store_control import DEFAULT_TIMEOUT, Decide, StoreControl
from zero_ckpt.errors import ZeroCkptError

__all__ = [
    "DEFAULT_TIMEOUT",
    "ControlPlane",
    "Decide",
    "LocalControl",
    "control_for_process_group",
    "meet_json",
    "process_group_store",
]


class ControlPlane(Protocol):
    """`meet` is called by every rank with the same `phase`; only rank 0's `decide` runs."""

    rank: int
    world_size: int

    def meet(self, phase: str, record: bytes, decide: Decide, timeout: float) -> bytes:
        """Hand `record` to rank 0, whose `decide(records by rank)` gives the answer that every rank gets.

        An error that `decide` raises is raised on every rank, of the same class and text. Raises `RankTimeoutError`
        naming lost ranks, and `DisagreementError` when another rank is in another phase.
        """

    def beat(self) -> None:
        """Tell the others that this rank is making progress. Cheap; called from any thread."""


class LocalControl:
    """One process: it agrees with itself."""

    rank = 0
    world_size = 1

    def meet(self, phase: str, record: bytes, decide: Decide, timeout: float) -> bytes:
        try:
            return decide([record])
        except ZeroCkptError:
            raise
        except Exception as error:
            raise shared_error(phase, error) from error

    def beat(self) -> None:
        pass


def meet_json(
    control: ControlPlane,
    phase: str,
    record: Any,
    decide: Callable[[list[Any]], Any],
    timeout: float | None,
) -> Any:
    """`control.meet` with records and an answer that are JSON. `timeout`: seconds; None: `DEFAULT_TIMEOUT`."""

    def answer(records: list[bytes]) -> bytes:
        return json.dumps(decide([json.loads(each) for each in records])).encode()

    limit = DEFAULT_TIMEOUT if timeout is None else timeout
    return json.loads(control.meet(phase, json.dumps(record).encode(), answer, limit))


def process_group_store() -> Any:
    """The rendezvous store of the default process group; None without a group, or for one of a single rank.

    When the group is destroyed and made anew, so is its store.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def control_for_process_group(name: str = "main") -> ControlPlane:
    """The control plane of the default process group, or of this process when there is none.

    Control planes of different names do not know of each other, so each may meet on a thread of its own.
    """
    import torch.distributed as dist

    store = process_group_store()
    if store is None:
        return LocalControl()
    return StoreControl(store, dist.get_rank(), dist.get_world_size(), name, connect=True)
