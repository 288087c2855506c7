"""What an unopened pickle leaves in place of classes and their objects: names and inert records. Runs no code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Global", "PickleError", "Record", "is_attack"]


class PickleError(Exception):
    """The bytes are no pickle that `torch.save` could have written."""


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. It is never looked up."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """An object of a class that is not opened: what it was called with, its state, and what was put into it.

    `new`: it was made by `__new__` (opcode NEWOBJ), not by a call (REDUCE).
    """

    kind: Global
    args: Any = ()
    new: bool = False
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def append(self, item: Any) -> None:
        self.items.append(item)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute that the state holds."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


_RUNNERS = """
    _ctypes bdb code codeop commands ctypes importlib marshal nt os pdb posix pty runpy shutil socket subprocess sys
    timeit webbrowser
"""
_RUNS_CODE = frozenset(_RUNNERS.split())
"""Modules whose functions no training state calls: a pickle that calls one was made to do harm."""

_BUILTIN_RUNNERS = "__import__ breakpoint compile delattr eval exec exit globals input locals open quit setattr vars"
_BUILTINS_RUN_CODE = frozenset(_BUILTIN_RUNNERS.split())
"""Functions of `builtins` of which the same holds. `getattr` is not one: enumerations and methods are pickled by it."""


def is_attack(kind: Global) -> bool:
    """Whether a pickle that calls `kind` was made to do harm."""
    if kind.module == "builtins":
        return kind.name in _BUILTINS_RUN_CODE
    return kind.module.partition(".")[0] in _RUNS_CODE
