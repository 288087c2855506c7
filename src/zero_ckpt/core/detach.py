"""What makes it safe to copy live state later: some of it is copied at once, the rest is watched.

Between a save beside the training and the next optimizer step, weights and optimizer state stay as they are. Buffers,
gradients and whatever a user or a framework hands over may change at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zero_ckpt.core.dtensors import local_tensor
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.saving import Captured
from zero_ckpt.errors import StateMismatchError

__all__ = ["Detached", "detach"]


@dataclass(slots=True)
class Detached:
    """`ready`: events of CUDA devices, after which the live tensors hold what is saved.

    `_versions`: how often each live tensor that is copied later had been changed in place.
    """

    ready: list[Any] = field(default_factory=list)
    _versions: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def check(self, changed: Sequence[str]) -> None:
        """Raise `StateMismatchError` when a tensor was changed since `detach`, or some are known to be `changed`.

        Changes through `tensor.data` leave no trace here.
        """
        seen = [key for key, (tensor, then) in self._versions.items() if _version(tensor) != then]
        found = list(dict.fromkeys([*seen, *changed]))
        if not found:
            return
        shown = ", ".join(f"'{key}'" for key in found[:4]) + (" ..." if len(found) > 4 else "")
        raise StateMismatchError(
            f"changed while they were saved: {shown}. Between a save beside the training and the next optimizer step "
            "weights and optimizer state must stay as they are. Call the save's handle.staged() before you change them."
        )


def detach(captured: Captured, buffers: frozenset[str]) -> Detached:
    """Copy in `captured` what may change before the next optimizer step; the rest can be checked afterwards."""
    captured.private = {key: tensor.clone() for key, tensor in captured.private.items()}
    state, model = captured.tensors["state"], captured.tensors["model"]
    captured.tensors["state"] = {key: _copied(tensor) for key, tensor in state.items()}
    captured.tensors["model"] = {k: _copied(t) if k in buffers else t for k, t in model.items()}
    later = {k: t for k, t in model.items() if k not in buffers} | captured.tensors["optim"]
    watched = {k: t for k, t in later.items() if not isinstance(t, LazyTensor)}
    versions = {k: (t, _version(t)) for k, t in watched.items() if not t.is_inference()}
    devices = {tensor.device for tensor in watched.values() if tensor.is_cuda}
    events = [torch.cuda.current_stream(device).record_event() for device in devices]
    return Detached(events, versions)


def _version(tensor: torch.Tensor) -> int:
    """Grows with each change in place: of a DTensor, through itself or through its local part."""
    local = local_tensor(tensor)
    return tensor._version + (0 if local is tensor else local._version)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, LazyTensor) else tensor.detach().clone()
