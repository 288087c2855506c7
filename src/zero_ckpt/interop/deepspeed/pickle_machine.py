"""A pickle machine that runs no code: a pickle's opcodes build plain values and inert records, and nothing else.

Owns the reading of pickles that others wrote. A global is only ever a name here; "calling" one looks its name up in a
fixed table of constructors of plain values, and makes a `Record` of the name and the arguments when it is not there.
Nothing is imported, whatever the pickle says. Memory is bounded by the pickle's length.

Opcodes: https://docs.python.org/3/library/pickletools.html, protocols 2 to 5, as `torch.save` and `pickle` write them.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from zero_ckpt.errors import UnsafeObjectError
from zero_ckpt.interop.deepspeed.records import Global, PickleError, Record, is_attack

__all__ = ["load_pickle"]


_PYTHON2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules as protocol 2 calls them, and their names."""

Constructor = Callable[..., Any]
Constructors = Mapping[str, Constructor]
_MARK = object()


def load_pickle(
    data: bytes | memoryview,
    constructors: Constructors,
    persistent: Callable[[Any], Any],
    start: int = 0,
) -> tuple[Any, int]:
    """(value, offset behind it) of the pickle at `start`.

    `constructors`: "module.name" -> what makes the value from the arguments of a call. `persistent(id)`: what a
    persistent id (a storage) stands for. Raises `PickleError`, or `UnsafeObjectError` for a call that only an
    attack makes.
    """
    machine = _Machine(memoryview(data), constructors, persistent, start)
    try:
        return machine.run(), machine.at
    except (UnsafeObjectError, PickleError):
        raise
    except _BROKEN as error:
        raise PickleError(f"at byte {machine.at}: {type(error).__name__}: {error}") from error


_BROKEN = (
    IndexError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)
"""What a broken pickle makes of the code below."""


class _Machine:
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

    def run(self) -> Any:
        stack = self._stack
        while True:
            code = self._data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                value = stack.pop()
                if value is _MARK:
                    raise PickleError("the pickle ends within a container")
                return value
            step = _STEPS.get(code)
            if step is None:
                raise PickleError(
                    f"at byte {self.at - 1}: opcode {code:#04x} is not one that is opened"
                )
            step(self)

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
        if value is _MARK:
            raise PickleError("a value expected on the stack, a mark found")
        return value

    def top(self) -> Any:
        return self._stack[-1]

    def pop_mark(self) -> list[Any]:
        """The values above the last mark."""
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
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


def _long(data: memoryview) -> int:
    return int.from_bytes(data, "little", signed=True)


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.push(make(m))


_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord("\x80"): lambda m: _check_protocol(m.number("<B")),
    ord("\x95"): _Machine.frame,
    ord("("): lambda m: m.push(_MARK),
    ord("0"): _Machine.drop,
    ord("1"): _Machine.drop_mark,
    ord("2"): lambda m: m.push(m.top()),
    ord("N"): _push(lambda m: None),
    ord("\x88"): _push(lambda m: True),
    ord("\x89"): _push(lambda m: False),
    ord("J"): _push(lambda m: m.number("<i")),
    ord("K"): _push(lambda m: m.number("<B")),
    ord("M"): _push(lambda m: m.number("<H")),
    ord("\x8a"): _push(lambda m: _long(m.take(m.number("<B")))),
    ord("\x8b"): _push(lambda m: _long(m.take(m.number("<i")))),
    ord("G"): _push(lambda m: m.number(">d")),
    ord("X"): _push(lambda m: m.text("<I")),
    ord("\x8c"): _push(lambda m: m.text("<B")),
    ord("\x8d"): _push(lambda m: m.text("<Q")),
    ord("B"): _push(lambda m: bytes(m.take(m.number("<I")))),
    ord("C"): _push(lambda m: bytes(m.take(m.number("<B")))),
    ord("\x8e"): _push(lambda m: bytes(m.take(m.number("<Q")))),
    ord("\x96"): _push(lambda m: bytearray(m.take(m.number("<Q")))),
    ord("U"): _push(lambda m: bytes(m.take(m.number("<B"))).decode("latin-1")),
    ord("T"): _push(lambda m: bytes(m.take(m.number("<i"))).decode("latin-1")),
    ord(")"): _push(lambda m: ()),
    ord("t"): _push(lambda m: tuple(m.pop_mark())),
    ord("\x85"): _push(lambda m: (m.pop(),)),
    ord("\x86"): _push(lambda m: (m.pop(), m.pop())[::-1]),
    ord("\x87"): _push(lambda m: (m.pop(), m.pop(), m.pop())[::-1]),
    ord("]"): _push(lambda m: []),
    ord("l"): _push(lambda m: m.pop_mark()),
    ord("}"): _push(lambda m: {}),
    ord("d"): _push(lambda m: _pairs(m.pop_mark())),
    ord("\x8f"): _push(lambda m: set()),
    ord("\x91"): _push(lambda m: frozenset(m.pop_mark())),
    ord("a"): _Machine.append,
    ord("e"): _Machine.extend,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("\x90"): _Machine.add_items,
    ord("c"): _Machine.make_global,
    ord("\x93"): _Machine.stack_global,
    ord("R"): _Machine.call,
    ord("\x81"): _Machine.new,
    ord("\x92"): _Machine.new_with_names,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persist,
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    ord("\x94"): _Machine.memoize,
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
}


def _check_protocol(protocol: int) -> None:
    if not 2 <= protocol <= 5:
        raise PickleError(f"pickle protocol 2 to 5 expected, {protocol} found")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))
