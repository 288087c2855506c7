"""Makes gradients of experts those of the loss averaged over all ranks.

The tokens of an expert come from the batches of all ranks among which experts are spread, so a backward pass brings it
the sum of the gradients of those ranks' losses. The sum is divided by the number of these ranks as it arrives; what
remains is to average over the ranks that have the same expert, which FSDP2 does for what it shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from zero_ckpt.zero.sync import average, hooked

__all__ = ["ExpertGradients", "divide_gradients"]


class ExpertGradients:
    """Averages gradients of experts' plain parameters over the ranks with the same experts, once per backward pass.

    What is averaged is `.grad`, with what unsynchronized passes left there; averaging what was averaged before changes
    nothing. An expert that got no token on one rank counts as zero there; one that got none on any keeps `None`.

    `experts`: the parameters. `every`: all plain parameters of the model, of which a pass must reach some on each rank
    of `replicas`: the averaging is collective over these. `divided`: those of `experts` whose gradients are divided by
    `parts` as they arrive (see above).
    """

    def __init__(
        self,
        experts: Sequence[nn.Parameter],
        every: Sequence[nn.Parameter],
        divided: Sequence[nn.Parameter],
        parts: int,
        replicas: DeviceMesh,
    ) -> None:
        self.enabled = True
        self._experts, self._replicas = list(experts), replicas
        self._pass = -1  # the backward pass at whose end the average is due, and will be made
        self._handles: list[RemovableHandle] = []
        if parts > 1:
            for parameter in filter(_has_gradient, divided):
                self._handles.append(hooked(parameter, "register_hook", lambda g: g / parts))
        if replicas.size() > 1:
            for parameter in filter(_has_gradient, every):
                register = "register_post_accumulate_grad_hook"
                self._handles.append(hooked(parameter, register, self._on_gradient))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_gradient(self, _: torch.Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if self.enabled and current != self._pass:
            self._pass = current
            engine: Any = Variable._execution_engine
            engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
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


def divide_gradients(expert: nn.Module, parts: int) -> None:
    """Divide what backward passes bring to the parameters of `expert` by `parts`; not what they bring to its inputs.

    For parameters that are replaced while the module runs. It must be used by calling it.
    """

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: _scaled(t, parts), (args, kwargs))

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: _scaled(t, 1 / parts), output)

    expert.register_forward_pre_hook(enter, with_kwargs=True)
    expert.register_forward_hook(leave)


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """A tensor of the same values, whose gradient is multiplied by `factor` on its way back."""
    if not tensor.requires_grad:
        return tensor
    same = tensor.view_as(tensor)
    untyped: Any = same
    untyped.register_hook(lambda gradient: gradient * factor)
    return same


def _has_gradient(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()
