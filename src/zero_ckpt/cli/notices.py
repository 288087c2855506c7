"""What `export` and `convert` say on the error stream: single lines, in the words of the command line."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from zero_ckpt.cli.text import printable
from zero_ckpt.core.finding import fallback_notice, find_checkpoint
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.errors import ZeroCkptError

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
    """Inside, warnings are printed without a place in the source; they and errors name options, not arguments."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except ZeroCkptError as error:
            raise type(error)(_with_options(str(error))) from error
        finally:
            for warning in caught:
                _note(command, _with_options(str(warning.message)))


def _with_options(text: str) -> str:
    """`text` with the options of the command line in the place of Python's arguments."""
    text = text.replace("weights_only=False", "--allow-pickle")
    text = text.replace("max_shard_size", "--max-shard-size")
    return re.sub(r"format='(\w+)'", r"--format \1", text)


def _note(command: str, text: str) -> None:
    print(f"zero-ckpt {command}: {printable(text)}", file=sys.stderr)
