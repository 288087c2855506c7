"""Point optimizers at new parameters, and LR schedulers at a new optimizer, when these are replaced."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zero_ckpt.core.parts import placed_like

__all__ = ["rebind_optimizer", "rebind_scheduler"]


def rebind_optimizer(
    optimizer: Optimizer, replaced: MutableMapping[torch.Tensor, torch.Tensor]
) -> int:
    """Make an optimizer that was created before `shard_module` update the sharded parameters.

    `replaced`: the parameter before -> the parameter in its place (`Sharding.replaced`). Groups
    keep their order and options. Existing state moves along: a tensor of the parameter's shape
    (momentum) is sharded like the parameter, any other with dimensions is replicated on its mesh,
    scalars and numbers stay; state is taken to be equal on all ranks. No communication. Returns
    how many parameters were replaced; those not in `replaced` stay as they are.
    """
    count = 0
    state: dict[torch.Tensor, Any] = defaultdict(dict)
    for group in optimizer.param_groups:
        for index, before in enumerate(group["params"]):
            now = replaced.get(before, before)
            if now is not before:
                group["params"][index] = now
                count += 1
            if before in optimizer.state:
                values = optimizer.state[before]
                state[now] = {k: placed_like(v, now) for k, v in values.items()}
    # In place: the optimizer's own object may be referenced elsewhere.
    other = {k: v for k, v in optimizer.state.items() if not isinstance(k, torch.Tensor)}
    optimizer.state.clear()
    optimizer.state.update({**other, **state})
    return count


def rebind_scheduler(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    """Make an LR scheduler that was created for `old` drive `new`, with all schedulers inside it.

    Works for torch's schedulers (`SequentialLR`, `ChainedScheduler`, `ReduceLROnPlateau`, ...) and
    for others that keep their optimizer in an attribute `optimizer` and other schedulers in
    attributes, lists or dicts. `new` must have the parameter groups of `old`, `initial_lr`
    included. Counters, base rates and the check that a step of the optimizer comes before the
    scheduler's are kept.
    """
    for each in _with_nested(scheduler):
        if getattr(each, "optimizer", None) is old:
            each.optimizer = new
    _track_steps(old, new)


def _with_nested(scheduler: Any) -> list[Any]:
    """A scheduler and all schedulers that it holds."""
    found: dict[int, Any] = {}
    pending = [scheduler]
    while pending:
        each = pending.pop()
        if id(each) not in found:
            found[id(each)] = each
            pending += [v for v in _flat(vars(each).values()) if _is_scheduler(v)]
    return list(found.values())


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, dict):
            yield from _flat(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _is_scheduler(value: Any) -> bool:
    return isinstance(value, LRScheduler) or (
        isinstance(getattr(value, "optimizer", None), Optimizer) and hasattr(value, "step")
    )


def _track_steps(old: Optimizer, new: Optimizer) -> None:
    """Carry over the mark that schedulers put on `old.step` to see whether it has been called."""
    if not hasattr(old.step, "_wrapped_by_lr_sched") or hasattr(new.step, "_wrapped_by_lr_sched"):
        return
    reference = weakref.ref(new)  # a bound method here would keep `new` alive in a cycle
    step = type(new).step

    @functools.wraps(step)
    def tracked(*args: Any, **kwargs: Any) -> Any:
        optimizer: Any = reference()
        optimizer._opt_called = True
        return step(optimizer, *args, **kwargs)

    tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    if getattr(old, "_opt_called", False):
        new._opt_called = True  # type: ignore[attr-defined]
    new.step = tracked  # type: ignore[method-assign]
