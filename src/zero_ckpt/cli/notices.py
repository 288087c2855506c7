"""What `export` and `convert` say on the error stream: single lines, in the words of the command line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from zero_ckpt.cli.text import printable
from zero_ckpt.core.finding import fallback_notice, find_checkpoint
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.errors import UnsafeObjectError

__all__ = ["find_source", "for_people"]


def find_source(command: str, path: str) -> str:
    """The folder of the checkpoint that `path` means, with a notice when that is not the one that `latest` names.

    Raises what `find_checkpoint` raises.
    """
    found = find_checkpoint(AnyStorage(), absolute(path))
    if found.problems:
        _note(command, fallback_notice(found.problems, found.folder))
    return found.folder


@contextmanager
def for_people(command: str) -> Iterator[None]:
    """Inside, warnings are printed without a place in the source, and errors name options, not Python's arguments."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except UnsafeObjectError as error:
            text = str(error).replace("weights_only=False", "--allow-pickle")
            raise UnsafeObjectError(text) from error
        finally:
            for warning in caught:
                _note(command, str(warning.message))


def _note(command: str, text: str) -> None:
    print(f"zero-ckpt {command}: {printable(text)}", file=sys.stderr)
