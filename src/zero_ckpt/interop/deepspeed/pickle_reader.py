"""Pickles that others wrote, read without running code: opcodes build plain values and inert records, and nothing else.

Owns which opcodes are opened, and what each does on the `Machine`. Memory is bounded by the pickle's length.

Opcodes: https://docs.python.org/3/library/pickletools.html, protocols 2 to 5, as `torch.save` and `pickle` write them.
"""

from __future__ import annotations

import pickle  # for the names of opcodes, and nothing else
import struct
from collections.abc import Callable
from typing import Any

from zero_ckpt.errors import UnsafeObjectError
from zero_ckpt.interop.deepspeed.pickle_machine import MARK, Constructors, Machine
from zero_ckpt.interop.deepspeed.records import PickleError

__all__ = ["load_pickle"]


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
    machine = Machine(memoryview(data), constructors, persistent, start)
    try:
        return _run(machine), machine.at
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


def _run(machine: Machine) -> Any:
    while (code := machine.opcode()) != _STOP:
        step = _STEPS.get(code)
        if step is None:
            raise PickleError(
                f"at byte {machine.at - 1}: opcode {code:#04x} is not one that is opened"
            )
        step(machine)
    return machine.result()


def _long(data: memoryview) -> int:
    return int.from_bytes(data, "little", signed=True)


def _push(make: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    return lambda m: m.push(make(m))


_STOP = pickle.STOP[0]

_NAMED: dict[bytes, Callable[[Machine], None]] = {
    pickle.PROTO: lambda m: _check_protocol(m.number("<B")),
    pickle.FRAME: Machine.frame,
    pickle.MARK: lambda m: m.push(MARK),
    pickle.POP: Machine.drop,
    pickle.POP_MARK: Machine.drop_mark,
    pickle.DUP: lambda m: m.push(m.top()),
    pickle.NONE: _push(lambda m: None),
    pickle.NEWTRUE: _push(lambda m: True),
    pickle.NEWFALSE: _push(lambda m: False),
    pickle.BININT: _push(lambda m: m.number("<i")),
    pickle.BININT1: _push(lambda m: m.number("<B")),
    pickle.BININT2: _push(lambda m: m.number("<H")),
    pickle.LONG1: _push(lambda m: _long(m.take(m.number("<B")))),
    pickle.LONG4: _push(lambda m: _long(m.take(m.number("<i")))),
    pickle.BINFLOAT: _push(lambda m: m.number(">d")),
    pickle.BINUNICODE: _push(lambda m: m.text("<I")),
    pickle.SHORT_BINUNICODE: _push(lambda m: m.text("<B")),
    pickle.BINUNICODE8: _push(lambda m: m.text("<Q")),
    pickle.BINBYTES: _push(lambda m: bytes(m.take(m.number("<I")))),
    pickle.SHORT_BINBYTES: _push(lambda m: bytes(m.take(m.number("<B")))),
    pickle.BINBYTES8: _push(lambda m: bytes(m.take(m.number("<Q")))),
    pickle.BYTEARRAY8: _push(lambda m: bytearray(m.take(m.number("<Q")))),
    pickle.SHORT_BINSTRING: _push(lambda m: bytes(m.take(m.number("<B"))).decode("latin-1")),
    pickle.BINSTRING: _push(lambda m: bytes(m.take(m.number("<i"))).decode("latin-1")),
    pickle.EMPTY_TUPLE: _push(lambda m: ()),
    pickle.TUPLE: _push(lambda m: tuple(m.pop_mark())),
    pickle.TUPLE1: _push(lambda m: (m.pop(),)),
    pickle.TUPLE2: _push(lambda m: (m.pop(), m.pop())[::-1]),
    pickle.TUPLE3: _push(lambda m: (m.pop(), m.pop(), m.pop())[::-1]),
    pickle.EMPTY_LIST: _push(lambda m: []),
    pickle.LIST: _push(lambda m: m.pop_mark()),
    pickle.EMPTY_DICT: _push(lambda m: {}),
    pickle.DICT: _push(lambda m: _pairs(m.pop_mark())),
    pickle.EMPTY_SET: _push(lambda m: set()),
    pickle.FROZENSET: _push(lambda m: frozenset(m.pop_mark())),
    pickle.APPEND: Machine.append,
    pickle.APPENDS: Machine.extend,
    pickle.SETITEM: Machine.set_item,
    pickle.SETITEMS: Machine.set_items,
    pickle.ADDITEMS: Machine.add_items,
    pickle.GLOBAL: Machine.make_global,
    pickle.STACK_GLOBAL: Machine.stack_global,
    pickle.REDUCE: Machine.call,
    pickle.NEWOBJ: Machine.new,
    pickle.NEWOBJ_EX: Machine.new_with_names,
    pickle.BUILD: Machine.build,
    pickle.BINPERSID: Machine.persist,
    pickle.BINPUT: lambda m: m.remember(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number("<I")),
    pickle.MEMOIZE: Machine.memoize,
    pickle.BINGET: lambda m: m.recall(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.recall(m.number("<I")),
}
"""Opcode -> what it does on the machine. Any other is refused."""

_STEPS = {opcode[0]: step for opcode, step in _NAMED.items()}


def _check_protocol(protocol: int) -> None:
    if not 2 <= protocol <= 5:
        raise PickleError(f"pickle protocol 2 to 5 expected, {protocol} found")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))
