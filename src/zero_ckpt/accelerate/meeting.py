"""Small agreements between the ranks of a save or a load, over the core's control plane.

Nothing here uses the training's process group.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zero_ckpt.core.control import DEFAULT_TIMEOUT, ControlPlane
from zero_ckpt.core.threads import start_thread
from zero_ckpt.errors import ZeroCkptError, by_name, to_record

__all__ = ["together"]


def together(
    control: ControlPlane,
    phase: str,
    action: Callable[[], Any],
    decide: Callable[[list[Any]], Any],
    timeout: float | None,
) -> Any:
    """Every rank runs `action`; rank 0's `decide` makes of their results, by rank, what all ranks get.

    Results are JSON. `action` may take its time: while it runs the others are told that this rank is alive. A rank
    whose `action` failed raises its own error; the others raise one of ours that names it. What `decide` raises is
    raised on every rank.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        with _alive(control):
            result = action()
    except Exception as error:
        failure = error

    def answer(records: list[bytes]) -> bytes:
        told = [json.loads(record) for record in records]
        for rank, (problem, _) in enumerate(told):
            if problem:
                raise by_name(problem[0], f"rank {rank}: {problem[1]}", ZeroCkptError)
        return json.dumps(decide([value for _, value in told])).encode()

    record = json.dumps([to_record(failure) if failure else [], result]).encode()
    limit = DEFAULT_TIMEOUT if timeout is None else timeout
    try:
        return json.loads(control.meet(phase, record, answer, limit))
    except ZeroCkptError:
        if failure is None:
            raise
        raise failure from None


@contextmanager
def _alive(control: ControlPlane) -> Iterator[None]:
    """Beat once a second inside: a user's hook may write or send files for minutes."""
    if control.world_size == 1:
        yield
        return
    done = threading.Event()

    def beat() -> None:
        while not done.wait(1.0):
            control.beat()

    thread = threading.Thread(target=beat, name="zero_ckpt-alive", daemon=True)
    start_thread(thread)
    try:
        yield
    finally:
        done.set()
        thread.join()
