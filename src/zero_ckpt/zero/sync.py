"""When gradients are averaged across ranks, and the averaging of parameters that are not sharded.

FSDP2 reduces the gradients of what it shards. `ReplicatedGradients` does for the other parameters
of a sharded module what DDP would: at the end of a backward pass, the gradients that it produced
are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from zero_ckpt.core.dtensors import local_tensor
from zero_ckpt.zero.gathered import is_kept_gathered

__all__ = [
    "GradientSwitch",
    "ReplicatedGradients",
    "average",
    "average_gradients_of",
    "buckets",
    "gradient_sync",
    "gradient_sync_disabled",
    "hooked",
    "reduces_gradients",
    "set_gradient_sync",
    "switch_gradients_of",
]

BUCKET_BYTES = 64 << 20


class _Reached(set[int]):
    """Which parameters a backward pass has reached. Held by the pass alone."""


class ReplicatedGradients:
    """Averages the gradients of plain parameters over a mesh, once per backward pass.

    What is averaged is a parameter's whole `.grad`: with what unsynchronized passes left there, as
    DDP does; and a part averaged before is equal on all ranks, so averaging it again changes
    nothing. Collective: a backward pass must reach the same of these parameters on every rank.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: DeviceMesh) -> None:
        self.enabled = True
        self._parameters = list(parameters)
        self._mesh = mesh
        self._passes: WeakValueDictionary[int, _Reached] = WeakValueDictionary()
        for index, parameter in enumerate(self._parameters):
            if parameter.is_floating_point() or parameter.is_complex():
                self._watch(index, parameter)

    def _watch(self, index: int, parameter: nn.Parameter) -> None:
        def on_gradient(_: torch.Tensor) -> None:
            if self.enabled:
                self._reached_now().add(index)

        hooked(parameter, "register_post_accumulate_grad_hook", on_gradient)

    def _reached_now(self) -> _Reached:
        """What the running backward pass has reached. A pass that fails has no end, and is forgotten."""
        current = torch._C._current_graph_task_id()
        reached = self._passes.get(current)
        if reached is None:
            reached = self._passes[current] = _Reached()
            engine: Any = Variable._execution_engine
            engine.queue_callback(partial(self._average, reached))
        return reached

    @torch.no_grad()
    def _average(self, reached: _Reached) -> None:
        # In the parameters' order: hooks fire in an order that may differ between ranks.
        grads = [self._parameters[index].grad for index in sorted(reached)]
        average([local_tensor(grad).detach() for grad in grads if grad is not None], self._mesh)


class GradientSwitch(Protocol):
    """Reduces gradients at the end of backward passes while it is `enabled`."""

    enabled: bool


def hooked(parameter: nn.Parameter, register: str, hook: Callable[[Any], Any]) -> RemovableHandle:
    """Register a hook by the method `register`, also on a frozen parameter: torch itself takes none on such."""
    trainable = parameter.requires_grad
    parameter.requires_grad_(True)
    handle: RemovableHandle = getattr(parameter, register)(hook)
    parameter.requires_grad_(trainable)
    return handle


def average(grads: Sequence[torch.Tensor], mesh: DeviceMesh) -> None:
    """Overwrite tensors with their means over the ranks of a mesh. Collective over it."""
    for bucket in buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        flat.div_(mesh.size())
        for dimension in range(mesh.ndim):
            dist.all_reduce(flat, group=mesh.get_group(dimension))
        for grad, mean in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            grad.copy_(mean.view(grad.shape))


# Kept beside the modules, so that nothing of it shows in their attributes, state or pickles.
_switches: WeakKeyDictionary[nn.Module, GradientSwitch] = WeakKeyDictionary()
_accumulating: WeakSet[nn.Module] = WeakSet()


def average_gradients_of(
    root: nn.Module, parameters: Sequence[nn.Parameter], mesh: DeviceMesh
) -> None:
    """From now on average the gradients of these parameters of `root`, unless switched off."""
    if parameters:
        switch_gradients_of(root, ReplicatedGradients(parameters, mesh))


def switch_gradients_of(module: nn.Module, switch: GradientSwitch) -> None:
    """Let `set_gradient_sync` of `module`, or of one around it, reach `switch`."""
    _switches[module] = switch


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Whether backward passes reduce gradients across ranks; for gradient accumulation.

    Off: gradients accumulate on each rank, nothing is sent. The first backward pass after it is on
    again reduces all that has accumulated. `module` is what `shard_module` was given, or one
    wrapped in `DistributedDataParallel`; any other module is left alone. Call it alike on every
    rank, before the forward pass that it is meant for.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = enabled
    (_accumulating.discard if enabled else _accumulating.add)(module)
    for submodule in module.modules():
        if submodule in _switches:
            _switches[submodule].enabled = enabled
        if isinstance(submodule, FSDPModule):
            submodule.set_requires_gradient_sync(enabled, recurse=False)
            if is_kept_gathered(submodule):
                # Nothing changes the parameters until gradients are reduced and a step follows.
                submodule.set_reshard_after_backward(enabled, recurse=False)


def reduces_gradients(module: nn.Module) -> bool:
    """Whether the last `set_gradient_sync` of this very module has left it on, as it is at first."""
    if isinstance(module, DistributedDataParallel):
        return bool(module.require_backward_grad_sync)
    return module not in _accumulating


def gradient_sync_disabled(module: nn.Module) -> AbstractContextManager[None]:
    """Accumulate without communication inside; see `set_gradient_sync`."""
    return gradient_sync(module, False)


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """`set_gradient_sync`, and afterwards as it was."""
    before = reduces_gradients(module)
    set_gradient_sync(module, enabled)
    try:
        yield
    finally:
        set_gradient_sync(module, before)


def buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors of one dtype and device, of about `BUCKET_BYTES` together, in order."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        alike = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size >= BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
