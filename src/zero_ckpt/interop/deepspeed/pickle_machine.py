"""The machine that a pickle runs on: a stack and a memo, on which plain values and inert records are built.

A global is only ever a name here; "calling" one looks its name up in a fixed table of constructors of plain values, and
makes a `Record` of the name and the arguments when it is not there. Nothing is imported, whatever the pickle says.
Knows no opcodes: `pickle_reader` says which of them does what.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from zero_ckpt.errors import UnsafeObjectError
from zero_ckpt.interop.deepspeed.records import Global, PickleError, Record, is_attack

__all__ = ["MARK", "Constructors", "Machine"]

_PYTHON2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules as protocol 2 calls them, and their names."""

Constructors = Mapping[str, Callable[..., Any]]
"""`module.name` of a global -> what makes the value from the arguments of a call."""

MARK = object()
"""What lies on the stack below the items of a container that is being filled."""


class Machine:
    """One pickle while it is read. `at`: the offset of the next byte.

    `persistent(id)`: what a persistent id (a storage) stands for.
    """

    def __init__(
        self,
        data: memoryview,
        constructors: Constructors,
        persistent: Callable[[Any], Any],
        start: int,
    ) -> None:
        self.at = start
        self._data, self._constructors, self._persistent = data, constructors, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def opcode(self) -> int:
        """The next opcode."""
        code = self._data[self.at]
        self.at += 1
        return code

    def result(self) -> Any:
        """The value that the pickle stands for, at its end."""
        value = self._stack.pop()
        if value is MARK:
            raise PickleError("the pickle ends within a container")
        return value

    def take(self, count: int) -> memoryview:
        start, self.at = self.at, self.at + count
        if count < 0 or self.at > len(self._data):
            raise PickleError(f"{count} bytes expected at byte {start}, the pickle ends before")
        return self._data[start : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        start = self.at
        while self._data[self.at] != 0x0A:
            self.at += 1
        self.at += 1
        return bytes(self._data[start : self.at - 1]).decode()

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is MARK:
            raise PickleError("a value expected on the stack, a mark found")
        return value

    def top(self) -> Any:
        return self._stack[-1]

    def pop_mark(self) -> list[Any]:
        """The values above the last mark."""
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise PickleError("no mark on the stack")
        values = stack[at + 1 :]
        del stack[at:]
        return values

    def text(self, form: str) -> str:
        return bytes(self.take(self.number(form))).decode("utf-8", "surrogatepass")

    def remember(self, index: int) -> None:
        self._memo[index] = self.top()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self.top()

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def drop(self) -> None:
        self._stack.pop()

    def drop_mark(self) -> None:
        self.pop_mark()

    def frame(self) -> None:
        """How long the next part is: of use to a reader from a stream only."""
        self.take(8)

    def append(self) -> None:
        value = self.pop()
        self._extend([value])

    def _extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, (list, Record)) or hasattr(target, "append"):
            for value in values:
                target.append(value)
        else:
            raise PickleError(f"items for a {type(target).__name__}")

    def extend(self) -> None:
        self._extend(self.pop_mark())

    def set_item(self) -> None:
        value = self.pop()
        key = self.pop()
        self._set_items([key, value])

    def set_items(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, values: list[Any]) -> None:
        target = self.top()
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if isinstance(target, Record):
            target.pairs += pairs
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise PickleError(f"entries for a {type(target).__name__}")

    def add_items(self) -> None:
        values = self.pop_mark()
        if not isinstance(self.top(), set):
            raise PickleError("items for what is no set")
        self.top().update(values)

    def make_global(self) -> None:
        module = self.line()
        self.push(Global(_PYTHON2_NAMES.get(module, module), self.line()))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("a global without a name")
        self.push(Global(module, name))

    def call(self) -> None:
        args = self.pop()
        self.push(self._construct(self.pop(), args, new=False))

    def new(self) -> None:
        args = self.pop()
        self.push(self._construct(self.pop(), args, new=True))

    def new_with_names(self) -> None:
        names = self.pop()
        args = self.pop()
        if names:
            args = (*args, names)
        self.push(self._construct(self.pop(), args, new=True))

    def _construct(self, kind: Any, args: Any, new: bool) -> Any:
        if not isinstance(kind, Global) or not isinstance(args, tuple):
            raise PickleError(f"a call of a {type(kind).__name__}")
        make = self._constructors.get(kind.path)
        if make is not None:
            try:
                return make(*args)
            except (TypeError, ValueError, AttributeError):
                return Record(kind, args, new)  # arguments that a plain value does not take
        if is_attack(kind):
            raise UnsafeObjectError(
                f"the pickle calls '{kind.path}', which a checkpoint has no reason to do. Nothing was run. "
                "Do not open this file with tools that run pickles."
            )
        return Record(kind, args, new)

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Record):
            target.state = state
        elif hasattr(target, "set_state"):
            target.set_state(state)
        elif not isinstance(target, OrderedDict):  # a state dict's `_metadata`
            raise PickleError(f"a state for a {type(target).__name__}")

    def persist(self) -> None:
        self.push(self._persistent(self.pop()))
