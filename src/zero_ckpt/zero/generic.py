"""The class of a sharded module: making one where `fully_shard` cannot, and the way back to the user's class.

`fully_shard` changes a module's class to one that derives from `FSDPModule` and the module's own.
Python allows that only between classes that are laid out alike, and a class with `Generic` for its
first base, as `class Net(Generic[T], nn.Module)`, is laid out differently. The class made here has
such a base itself. It is entered where `fully_shard` keeps the classes that it has made (in torch
2.6 to 2.13 at least), and found there.
"""

from __future__ import annotations

from typing import Any, Generic, NoReturn, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fully_shard import cls_to_fsdp_cls

__all__ = ["allow_generic", "users_class"]

_T = TypeVar("_T")


class _GenericFirst(Generic[_T]):
    """Gives a class that derives from it first the layout of a class that does so from `Generic`."""


def allow_generic(module: nn.Module) -> None:
    """Let `fully_shard(module)` work when the module's class derives from `Generic` first."""
    kind = type(module)
    if kind not in cls_to_fsdp_cls and _is_generic_first(kind):
        bases = (_GenericFirst, FSDPModule, kind)
        body = {"__deepcopy__": _refuse_copy, "__module__": kind.__module__}
        cls_to_fsdp_cls[kind] = type(f"FSDP{kind.__name__}", bases, body)


def users_class(kind: type[Any]) -> type[Any]:
    """The class that a module had before `fully_shard` changed it to `kind`."""
    index = getattr(kind, "_orig_cls_mro_index", 2)  # older torch has no name for it
    return kind.__mro__[index] if issubclass(kind, FSDPModule) else kind


def _is_generic_first(kind: type) -> bool:
    base: type | None = kind
    while base is not None:
        if base.__base__ is Generic:
            return True
        base = base.__base__
    return False


def _refuse_copy(module: nn.Module, memo: Any) -> NoReturn:
    raise AssertionError(
        "A module that is sharded with FSDP2 cannot be copied. Use its state_dict()."
    )
