"""SLURM's signal before a job ends: Lightning saves in its handler; here all ranks do so after the same batch.

A signal comes to each rank at its own moment: to one within a save, to another within a collective that the first has
not begun. A save at once would wait for ranks that wait for this one. So the handler notes it, and after each batch the
ranks begin a vote on whether one has. It is counted after the next batch: nobody waits for a device that is still at
work on this one.
"""

from __future__ import annotations

import signal
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from zero_ckpt.lightning.namespaces import Namespace, load

if TYPE_CHECKING:
    from lightning.pytorch import Callback as Host
else:
    Host = object  # the Callback of either copy of Lightning comes after the mixin

__all__ = ["attach_requeue", "detach_requeue"]


class _Vote:
    """Whether any rank says yes. Collective; does not wait for the device of the ranks, as `passed` does."""

    def __init__(self, says_yes: bool, device: torch.device) -> None:
        count = torch.full((), int(says_yes), device=device)
        torch.distributed.all_reduce(count)
        self._count = count.to("cpu", non_blocking=True)
        self._arrived: Any = None
        if device.type == "cuda":
            self._arrived = torch.cuda.current_stream(device).record_event()

    def passed(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._count)


class RequeueMixin(Host):
    """A callback that calls Lightning's handler of the signal, on all ranks together."""

    def __init__(self) -> None:
        super().__init__()
        self._signal: int | None = None
        self._handler: Any = None
        self._was_asked = False
        self._vote: _Vote | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        number = _requeue_signal(trainer)
        if number is None or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(number)
        if _is_lightnings(handler):
            self._signal, self._handler, self._was_asked = number, handler, False
            signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        earlier, self._vote = self._vote, _Vote(self._was_asked, trainer.strategy.root_device)
        if earlier is not None and earlier.passed():
            self._answer()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if _Vote(self._was_asked, trainer.strategy.root_device).passed():
            self._answer()
        if self._signal is not None:
            signal.signal(self._signal, self._handler)
            self._signal = None

    def _answer(self) -> None:
        self._was_asked, self._vote = False, None
        if self._handler is not None:
            self._handler(self._signal, None)

    def _note(self, number: int, frame: Any) -> None:
        self._was_asked = True


def _is_lightnings(handler: Any) -> bool:
    """Whether Lightning has set it. It leaves a handler of the user's alone, and so do we."""
    return type(handler).__module__.endswith(".signal_connector")


@cache
def _made(namespace: str) -> type[Any]:
    copy = load(namespace)
    return type("Requeue", (RequeueMixin, copy.callback), {})


def attach_requeue(trainer: Any, namespace: Namespace) -> None:
    """Add the callback where several ranks of a SLURM job are to save when they get a signal."""
    detach_requeue(trainer)
    if trainer.world_size > 1 and _requeue_signal(trainer) is not None:
        trainer.callbacks.append(_made(namespace.name)())


def detach_requeue(trainer: Any) -> None:
    """Leave a trainer with the callbacks that its user gave it."""
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, RequeueMixin)]


def _requeue_signal(trainer: Any) -> int | None:
    environment = trainer.strategy.cluster_environment
    if not getattr(environment, "auto_requeue", False):
        return None
    number: int | None = getattr(environment, "requeue_signal", None)
    return number
