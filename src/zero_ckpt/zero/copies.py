"""Deep copies of a sharded model, which torch refuses: for averaged weights, or a teacher.

A copy's parameters are placed like the model's, and its modules have neither FSDP2's class nor its hooks, so that it
can hold weights and not be trained.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from zero_ckpt.zero.gathered import reshard
from zero_ckpt.zero.generic import users_class

__all__ = ["allow_copies"]


def allow_copies(model: nn.Module) -> None:
    """Let `copy.deepcopy` copy a sharded `model`, which torch refuses."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            type(module).__deepcopy__ = _copy_sharded  # type: ignore[attr-defined]


def _copy_sharded(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """This rank's part of a copy. No communication; not allowed within forward and backward."""
    reshard(module)
    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in memo:
            own = parameter.detach().clone()
            memo[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    with _as_before_sharding(module):
        return deepcopy(module, memo)


@contextmanager
def _as_before_sharding(model: nn.Module) -> Iterator[None]:
    """Inside, the modules have the classes and the hooks that their users gave them."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        for module, kind, attributes in before:
            if isinstance(module, FSDPModule):
                module.__class__ = users_class(kind)
            for name, value in attributes.items():
                if name.startswith(("_fsdp_", "_is_fsdp_", "__composable_api_")):
                    del vars(module)[name]
                elif "hooks" in name and isinstance(value, OrderedDict):
                    own = {k: hook for k, hook in value.items() if not _is_of_sharding(hook)}
                    vars(module)[name] = OrderedDict(own)
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)


def _is_of_sharding(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # out of torch's wrapper
    owner = getattr(hook, "__self__", None)
    home = getattr(hook if owner is None else type(owner), "__module__", None) or ""
    return home.startswith(("torch.distributed.", "zero_ckpt."))
