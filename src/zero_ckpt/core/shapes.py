"""What a value that was stored must look like before somebody relies on it: a small language, and the check.

Checksums say that a value is what was saved, and not that it is what this version saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zero_ckpt.errors import describe

__all__ = ["Shape", "misfit"]

Shape = Any
"""One of these:

    a type, or a tuple of them  an instance; a bool is no int
    {"name": shape, ...}        a dict that has at least these
    {str: shape}                a dict of any names, each with such a value
    [shape]                     a list of such values
    a function of the value     raises when it does not fit, and may return the shape of what remains to be checked
"""


def misfit(value: Any, shape: Shape, where: str) -> str:
    """Where in `value`, which is called `where`, something does not fit, and what; "" when all does."""
    if isinstance(shape, (type, tuple)):
        return "" if _is_a(value, shape) else f"{where}: {_named(shape)} expected, {_kind(value)}"
    if isinstance(shape, Mapping):
        return _misfit_of_dict(value, shape, where)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where}: a list expected, {_kind(value)}"
        found = (misfit(each, shape[0], f"{where}[{i}]") for i, each in enumerate(value))
        return next(filter(None, found), "")
    return _misfit_by(shape, value, where)


def _misfit_of_dict(value: Any, shape: Mapping[Any, Shape], where: str) -> str:
    if not isinstance(value, dict):
        return f"{where}: a dict expected, {_kind(value)}"
    if str in shape:
        shape = dict.fromkeys(value, shape[str])
    missing = [name for name in shape if name not in value]
    if missing:
        return f"{where}/{missing[0]}: missing"
    found = (misfit(value[name], each, f"{where}/{name}") for name, each in shape.items())
    return next(filter(None, found), "")


def _misfit_by(check: Callable[[Any], Shape], value: Any, where: str) -> str:
    try:
        rest = check(value)
    except Exception as error:  # of whatever kind: nobody knows what the value is
        return f"{where}: {describe(error)}"
    return "" if rest is None else misfit(value, rest, where)


def _is_a(value: Any, kinds: type | tuple[type, ...]) -> bool:
    accepted = kinds if isinstance(kinds, tuple) else (kinds,)
    return type(value) in accepted or (isinstance(value, accepted) and type(value) is not bool)


def _named(kinds: type | tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def _kind(value: Any) -> str:
    return f"{type(value).__name__} found"
