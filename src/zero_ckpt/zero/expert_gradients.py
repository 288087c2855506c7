"""Gradients of experts that are whole on each rank that has them: those of the loss averaged over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from zero_ckpt.zero.sync import average, hooked


class ExpertGradients:
    """Scales what a backward pass brings to an expert, and averages it over the ranks that have the same expert.

    The tokens of an expert come from the batches of all `parts` ranks among which experts are spread, so a pass brings
    the sum of their losses' gradients: it is divided by `parts` as it arrives. At the end of the pass `.grad` is
    averaged over `replicas`, with what unsynchronized passes left there; averaging what was averaged before changes
    nothing. Collective over `replicas`: of `every`, the model's plain parameters, a pass must reach some on each of its
    ranks. An expert that got no token on one of them counts as zero there, and keeps `None` when that is so on all.
    """

    def __init__(
        self,
        experts: Sequence[nn.Parameter],
        every: Sequence[nn.Parameter],
        parts: int,
        replicas: DeviceMesh,
    ) -> None:
        self.enabled = True
        self._experts, self._replicas = list(experts), replicas
        self._queued = False
        self._handles: list[RemovableHandle] = []
        if parts > 1:
            for parameter in filter(_has_gradient, experts):
                self._handles.append(hooked(parameter, "register_hook", lambda g: g / parts))
        if replicas.size() > 1:
            for parameter in filter(_has_gradient, every):
                register = "register_post_accumulate_grad_hook"
                self._handles.append(hooked(parameter, register, self._on_gradient))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_gradient(self, _: torch.Tensor) -> None:
        if self.enabled and not self._queued:
            self._queued = True
            engine: Any = Variable._execution_engine
            engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued = False
        trained = [p for p in self._experts if _has_gradient(p) and p.requires_grad]
        if not trained:
            return
        reached = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8)
        reached = reached.to(trained[0].device)
        dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=self._replicas.get_group())
        grads = []
        for parameter, is_reached in zip(trained, reached.tolist(), strict=True):
            if is_reached:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        average(grads, self._replicas)


def _has_gradient(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()
