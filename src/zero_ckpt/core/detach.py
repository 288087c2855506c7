"""What makes it safe to copy live state later: some of it is copied at once, the rest is held and watched.

Between a save beside the training and the next optimizer step, weights and optimizer state stay as they are. Buffers,
gradients and whatever a user or a framework hands over may change at any time, and so may a frozen copy of the weights
that a forward moves after them (a teacher). Those are copied at once.

What is copied later is held by references of its own: memory that is taken from a parameter meanwhile (`module.half()`,
`parameter.data = ...`) stays until it has been copied, with the values of the save.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from zero_ckpt.core.dtensors import address_of, local_tensor
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.memory import copy_bytes, prefer_huge_pages
from zero_ckpt.core.saving import Captured
from zero_ckpt.core.sources import digest_of
from zero_ckpt.core.state import Snapshot
from zero_ckpt.errors import StateMismatchError

__all__ = ["Copies", "Detached", "detach"]

_Counters = tuple[torch.Tensor, ...]

_WORTH_KEEPING = 1 << 20
"""Bytes. Memory of smaller copies is as cheap to make anew."""


class Copies:
    """Memory for what is copied at once, kept from one save to the next: fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._spare: dict[Any, list[torch.Tensor]] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of this rank's part of `tensor`."""
        if isinstance(tensor, LazyTensor):
            return tensor
        local = local_tensor(tensor).detach()
        if not _is_worth_keeping(local):
            return _clone(local)
        kept = self._spare.get((local.dtype, local.shape))
        copy = kept.pop() if kept else torch.empty_like(local)
        if not kept:
            prefer_huge_pages(copy.data_ptr(), copy.nbytes)
        copy_bytes(copy.data_ptr(), local.data_ptr(), local.nbytes)
        return copy

    def give(self, copies: Iterable[torch.Tensor]) -> None:
        """Take back what a save needs no more. From any thread."""
        for copy in filter(_is_worth_keeping, copies):
            self._spare.setdefault((copy.dtype, copy.shape), []).append(copy)

    def drop_unused(self) -> None:
        """Let go of what the save that was just begun had no use for."""
        self._spare.clear()


def _is_worth_keeping(tensor: torch.Tensor) -> bool:
    is_large = type(tensor) is torch.Tensor and tensor.nbytes >= _WORTH_KEEPING
    return is_large and address_of(tensor) != 0


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return tensor.clone()
    except torch.OutOfMemoryError:  # of a device
        return tensor.cpu()


@dataclass(slots=True)
class Detached:
    """`ready`: events of CUDA devices, after which the live tensors hold what is saved. `copies`: made at once.

    `nbytes`: what may change before the next step. `fits`: it has been copied; else the save must stage everything
    before it returns.
    """

    ready: list[Any] = field(default_factory=list)
    copies: list[torch.Tensor] = field(default_factory=list)
    nbytes: int = 0
    fits: bool = True
    _versions: dict[str, tuple[_Counters, int]] = field(default_factory=dict)
    _digests: dict[str, tuple[torch.Tensor, bytes]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `StateMismatchError` when a tensor was changed in place since `detach`.

        Changes through `tensor.data` leave no trace, and are found by digests only.
        """
        seen = [k for k, (counters, then) in self._versions.items() if _version(counters) != then]
        seen += [key for key, (tensor, then) in self._digests.items() if digest_of(tensor) != then]
        found = list(dict.fromkeys(seen))
        if not found:
            return
        shown = ", ".join(f"'{key}'" for key in found[:4]) + (" ..." if len(found) > 4 else "")
        raise StateMismatchError(
            f"changed while they were saved: {shown}. Between a save beside the training and the next optimizer step "
            "weights and optimizer state must stay as they are. Change them after optimizer.step(), or wait with the "
            "save's handle.staged() before; or save without async."
        )


def detach(
    captured: Captured,
    snapshot: Snapshot,
    copies: Copies,
    room: int,
    *,
    digests: bool = False,
) -> Detached:
    """Copy in `captured` what may change before the next optimizer step, if that takes at most `room` bytes.

    `digests`: of all that is copied later, so that every change of it is found.
    """
    at_once = snapshot.buffers | _teachers(captured.tensors["model"], snapshot)
    nbytes = _local_bytes(_moving(captured, at_once))
    fits = nbytes <= room
    made = _copy(captured, at_once, copies) if fits else []
    copies.drop_unused()
    watched = _hold(captured, at_once)
    held = captured.tensors["model"] | captured.tensors["optim"]
    counters = {k: _counters(t) for k, t in watched.items() if not t.is_inference()}
    devices = {tensor.device for tensor in watched.values() if tensor.is_cuda}
    return Detached(
        ready=[torch.cuda.current_stream(device).record_event() for device in devices],
        copies=made,
        nbytes=nbytes,
        fits=fits,
        _versions={k: (c, _version(c)) for k, c in counters.items()},
        _digests={k: (held[k], digest_of(held[k])) for k in watched} if digests else {},
    )


def _moving(captured: Captured, at_once: Collection[str]) -> Iterator[torch.Tensor]:
    """The tensors that may change before the next step. `at_once`: keys of the weights and buffers among them."""
    yield from captured.private.values()
    yield from captured.tensors["state"].values()
    yield from (t for k, t in captured.tensors["model"].items() if k in at_once)


def _copy(captured: Captured, at_once: Collection[str], copies: Copies) -> list[torch.Tensor]:
    """Put copies in the place of what `_moving` names; returns them."""
    made: list[torch.Tensor] = []

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        made.append(copies.of(tensor))
        return made[-1]

    state, model = captured.tensors["state"], captured.tensors["model"]
    captured.private = {key: copied(tensor) for key, tensor in captured.private.items()}
    captured.tensors["state"] = {key: copied(tensor) for key, tensor in state.items()}
    captured.tensors["model"] = {k: copied(t) if k in at_once else t for k, t in model.items()}
    return made


def _hold(captured: Captured, at_once: Collection[str]) -> dict[str, torch.Tensor]:
    """Take references of our own to the rest; returns those of it that are live, as they are known outside."""
    model, optim = captured.tensors["model"], captured.tensors["optim"]
    later = {k: t for k, t in model.items() if k not in at_once} | optim
    captured.tensors["model"] = {k: t if k in at_once else _held(t) for k, t in model.items()}
    captured.tensors["optim"] = {key: _held(tensor) for key, tensor in optim.items()}
    return {k: t for k, t in later.items() if not isinstance(t, LazyTensor)}


def _teachers(model: Mapping[str, torch.Tensor], snapshot: Snapshot) -> frozenset[str]:
    """Frozen parameters that may be an average of the trained ones, which a forward pass moves along with them.

    Frozen parameters that are larger than the trained ones are none of these, but a base that nothing changes.
    """
    frozen = snapshot.frozen & model.keys()
    if not frozen:
        return frozen
    trained = model.keys() - frozen - snapshot.buffers
    few = _local_bytes(model[k] for k in frozen) <= _local_bytes(model[k] for k in trained)
    return frozen if few else frozenset()


def _local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(0 if isinstance(t, LazyTensor) else local_tensor(t).nbytes for t in tensors)


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, whose memory stays when it is taken from `tensor`."""
    return tensor if isinstance(tensor, LazyTensor) else local_tensor(tensor).detach()


def _counters(tensor: torch.Tensor) -> _Counters:
    """Tensors that count changes in place of what `tensor` is now: of a DTensor, through itself or its local part.

    They are not `tensor` itself, which begins to count anew when it is exchanged (`module.half()` of a DTensor).
    """
    local = local_tensor(tensor)
    if local is tensor:
        return (tensor.detach(),)
    with torch._C._DisableTorchDispatch():  # the detach() of a DTensor costs ten times this
        own = torch._C.TensorBase.detach(tensor)
    return own, local.detach()


def _version(counters: _Counters) -> int:
    return sum(counter._version for counter in counters)
