"""Steps of optimizers, and loads, that wait until a save has copied what they are about to change.

Owns the hook that torch calls before every step of every optimizer. Knows no saves: it is told how to wait.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["StepFence", "await_staged"]


class Fenced(Protocol):
    def fence(self) -> None:
        """Return when live tensors may change."""


_FENCED: weakref.WeakSet[Any] = weakref.WeakSet()
"""All owners of fences in this process."""


def await_staged() -> None:
    """Before a load fills live tensors, which leaves no trace in them: return when no save has to copy them any more.

    It may be another `Checkpointer` that saves, or another door.
    """
    for owner in list(_FENCED):
        owner.fence()


class StepFence:
    """From now on every step of every optimizer waits in `owner.fence()`, until `remove`, or until `owner` is gone.

    A step that is given a closure, as Lightning gives it forward and backward, waits when that has returned: torch's
    own optimizers call it before they change anything. Of others that is not known, and they wait before.
    """

    def __init__(self, owner: Fenced) -> None:
        owned = weakref.ref(owner)

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> Any:
            alive = owned()
            return None if alive is None else _wait(alive, optimizer, args, kwargs)

        self._owned = owned
        _FENCED.add(owner)
        self._hook = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(owner, self._hook.remove)

    def remove(self) -> None:
        _FENCED.discard(self._owned())
        self._hook.remove()


def _wait(
    owner: Fenced, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Wait, or return arguments for the step that make it wait after its closure. `args[0]` is the optimizer."""
    named = "closure" in kwargs
    closure = kwargs["closure"] if named else args[1] if len(args) > 1 else None
    is_torchs = type(optimizer).step.__module__.partition(".")[0] == "torch"
    if not (is_torchs and callable(closure)):
        owner.fence()
        return None

    def then_fenced() -> Any:
        loss = closure()
        owner.fence()
        return loss

    if named:
        return args, {**kwargs, "closure": then_fenced}
    return (args[0], then_fenced, *args[2:]), kwargs
