"""Stage 1: each rank updates a part of the parameters and sends it to the others.

The user's own optimizer, whatever its class, does the updating; `ZeroRedundancyOptimizer` assigns
whole parameters to ranks and distributes the results.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import LBFGS, Optimizer

from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero.experts import expert_parameters

with warnings.catch_warnings():
    # The package also defines TorchScript optimizers, which warn on import; none is used here.
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

__all__ = [
    "PartitionedOptimizer",
    "check_optimizer",
    "owned_parameters",
    "owned_state",
    "partition_optimizer",
]


def check_optimizer(optimizer: Optimizer, stage: int) -> None:
    """Raise `ConfigurationError` when this optimizer cannot be right at this ZeRO stage."""
    if stage >= 1 and isinstance(optimizer, LBFGS):
        raise ConfigurationError(
            "LBFGS cannot be sharded: its search direction couples all parameters, and how often "
            "it calls the closure would differ between ranks, which hangs. Found it with "
            f"stage={stage}; use stage=0, or another optimizer."
        )
    inner = [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if stage == 1 and inner:
        raise ConfigurationError(
            f"{type(optimizer).__name__} wraps another optimizer (in attribute {inner[0]!r}), "
            "which stage=1 cannot partition. Use stage 0, 2 or 3."
        )


def partition_optimizer(
    optimizer: Optimizer, process_group: dist.ProcessGroup | None = None
) -> ZeroRedundancyOptimizer:
    """Replace an optimizer over whole parameters by one that updates only this rank's part of them.

    Collective over `process_group` (default: all ranks), with the same parameters in the same
    order on every rank. The result shares the group dicts of `optimizer` (same options, and a
    change through either object is seen by both), its defaults, hooks, class name and state, from
    which the part of other ranks is dropped. Every step takes the hyper-parameters from these groups.
    `optimizer` must not step any more; bind its LR schedulers to the result with
    `rebind_scheduler`. Given an already partitioned optimizer, returns it.

    Raises `ConfigurationError` for optimizers that cannot be partitioned (see `check_optimizer`).
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        return optimizer
    check_optimizer(optimizer, stage=1)

    def local(groups: list[dict[str, Any]], **_: Any) -> Optimizer:
        return _with_groups(optimizer, groups)

    constructor: Any = local  # documented as a class; only ever called with groups and defaults
    kind = _named_like(type(optimizer).__name__, _has_modes(optimizer))
    return kind(optimizer.param_groups, constructor, process_group, **optimizer.defaults)


class PartitionedOptimizer(ZeroRedundancyOptimizer):
    """`ZeroRedundancyOptimizer` without its restriction to one dtype, and with declared experts.

    That restriction is needed only when parameters are kept in flat buckets, which they are not
    here. Experts are on their ranks alone already: each rank updates its own, and sends them to
    nobody.
    """

    _partition_parameters_cache: list[Any]

    def _verify_same_dense_param_type(self) -> None:
        pass

    def _partition_parameters(self, params_per_rank: Any = None) -> list[list[dict[str, Any]]]:
        is_new = not self._partition_parameters_cache
        base: Any = super()
        parts: list[list[dict[str, Any]]] = base._partition_parameters(params_per_rank)
        experts = expert_parameters() if is_new else {}
        for index, group in enumerate(self.param_groups if experts else ()):
            for part in parts:
                part[index]["params"] = [p for p in part[index]["params"] if p not in experts]
            own = [p for p in group["params"] if p in experts]
            parts[self.rank][index]["params"] += own
        return parts

    def _broadcast_params_from_rank(self, rank: int) -> list[Any]:
        experts = expert_parameters()
        source = dist.get_global_rank(self.process_group, rank)
        return [
            dist.broadcast(p.data, src=source, group=self.process_group, async_op=True)
            for group in self._partition_parameters()[rank]
            for p in group["params"]
            if p not in experts
        ]


class _Modes(PartitionedOptimizer):
    """For an optimizer with two sets of weights, as schedule-free ones are: a change of mode changes parameters."""

    def train(self, *args: Any) -> None:
        """The optimizer's own, with its result sent to all ranks. Collective."""
        self._change_mode("train", *args)

    def eval(self) -> None:
        """The optimizer's own, with its result sent to all ranks. Collective."""
        self._change_mode("eval")

    @torch.no_grad()
    def _change_mode(self, name: str, *args: Any) -> None:
        base: Any = super()
        base._sync_param_groups(self.param_groups, self.optim.param_groups)
        getattr(self.optim, name)(*args)
        base._sync_param_groups(self.optim.param_groups, self.param_groups)
        base._sync_params()


def _has_modes(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@cache
def _named_like(name: str, has_modes: bool) -> type[PartitionedOptimizer]:
    """The class under the name of the user's: loggers call the learning rate after it."""
    base = _Modes if has_modes else PartitionedOptimizer
    return type(name, (base,), {"__module__": __name__})


def _with_groups(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer equal to the given one, over other groups of its parameters.

    Made without its constructor, whose arguments need not be among its defaults.
    """
    local = object.__new__(type(optimizer))
    # `step` is there when an LR scheduler has patched it, bound to the other object.
    local.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    local.param_groups = groups
    # The same state object, without what other ranks own: that memory is what stage 1 saves.
    owned = {p for group in groups for p in group["params"]}
    for parameter in [p for p in local.state if isinstance(p, torch.Tensor) and p not in owned]:
        del local.state[parameter]
    return local


def owned_parameters(optimizer: ZeroRedundancyOptimizer) -> list[torch.Tensor]:
    """The parameters that this rank updates, whether or not they have state yet."""
    return [p for group in optimizer.optim.param_groups for p in group["params"]]


def owned_state(optimizer: ZeroRedundancyOptimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """This rank's part of the optimizer state: parameter -> its live state, whole tensors.

    Read hyper-parameters from `optimizer.param_groups`; the inner optimizer's are synchronized only
    when it steps.
    """
    return {
        p: optimizer.optim.state[p]
        for p in owned_parameters(optimizer)
        if p in optimizer.optim.state
    }
