"""Every exception that zero_ckpt raises on purpose.

    ZeroCkptError
      + ConfigurationError         (ValueError)         an argument or a combination that cannot work
      + CheckpointNotFoundError    (FileNotFoundError)  no such directory, tag or `latest`
      |   + NothingSavedError                           ... and nothing there that could have been one
      + CorruptCheckpointError     (ValueError)         what lies on disk is not what was saved
      |   + CorruptManifestError                        manifest.json: missing bytes, bad checksum, lies
      |   + CorruptShardError                           a shard file: length, header, block table or a block
      + FormatVersionError         (ValueError)         written by another version of zero_ckpt, in its way
      + StateMismatchError         (ValueError)         the checkpoint does not fit the model or optimizer
      + UnsafeObjectError          (UnpicklingError)    a pickled object, and the caller did not allow pickles
      + DisagreementError          (ValueError)         ranks were given different tags or directories, or other calls
      + SaveError                  (OSError)            a save failed on some rank; nothing was committed
      + RankTimeoutError           (TimeoutError)       a rank did not arrive or stopped making progress

Each also inherits the builtin that fits, so `except FileNotFoundError` works as expected. A message names what
happened, where (file, tensor, block), what was expected, what was found, and what to do next.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import NoReturn

__all__ = [
    "CheckpointNotFoundError",
    "ConfigurationError",
    "CorruptCheckpointError",
    "CorruptManifestError",
    "CorruptShardError",
    "DisagreementError",
    "FormatVersionError",
    "NothingSavedError",
    "RankTimeoutError",
    "SaveError",
    "StateMismatchError",
    "UnsafeObjectError",
    "ZeroCkptError",
]


class ZeroCkptError(Exception):
    """Base of every error that zero_ckpt raises on purpose."""


class ConfigurationError(ZeroCkptError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class CheckpointNotFoundError(ZeroCkptError, FileNotFoundError):
    """There is no checkpoint where one was asked for."""


class NothingSavedError(CheckpointNotFoundError):
    """Nothing was ever saved there: no such directory or tag, or a directory in which no save has ended.

    The only error that `missing_ok` turns into a warning. A directory that cannot be read, or that shows traces of a
    checkpoint that is gone, raises `CheckpointNotFoundError` itself.
    """


class CorruptCheckpointError(ZeroCkptError, ValueError):
    """What lies on disk is not what was saved."""


class CorruptManifestError(CorruptCheckpointError):
    """`manifest.json` cannot be trusted."""


class CorruptShardError(CorruptCheckpointError):
    """A shard file's length, header, block table or a data block differs from what was saved."""


class FormatVersionError(ZeroCkptError, ValueError):
    """The checkpoint was written in a format that this version does not know."""


class StateMismatchError(ZeroCkptError, ValueError):
    """The checkpoint's keys or shapes do not fit the live model or optimizer."""


class UnsafeObjectError(ZeroCkptError, pickle.UnpicklingError):
    """An object was stored as a pickle, and opening pickles was not allowed."""


class DisagreementError(ZeroCkptError, ValueError):
    """Ranks were given different tags or directories for one collective call, or made different calls."""


class SaveError(ZeroCkptError, OSError):
    """A save failed on some rank. Nothing was committed; earlier checkpoints are intact."""


class RankTimeoutError(ZeroCkptError, TimeoutError):
    """A rank did not arrive in time, or stopped making progress.

    `outcome_unknown`: whether the other ranks may have completed the call without this one's knowing.
    """

    outcome_unknown = False


def describe(error: BaseException) -> str:
    """An error in one line for a person, as `/path/file: No space left on device`; also one that is not ours."""
    if isinstance(error, ZeroCkptError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def to_record(error: BaseException) -> list[str]:
    """An error as ranks send it to each other: the name of its class, "" for one that is not ours, and its text."""
    ours = isinstance(error, ZeroCkptError)
    return [type(error).__name__ if ours else "", describe(error)]


def raise_for(error: ZeroCkptError, failure: BaseException | None) -> NoReturn:
    """Raise `error`, which all ranks raise, with this rank's own problem as its cause.

    `failure`: that problem; its traceback shows where it happened. Where both say the same, `failure` is raised alone.
    """
    if failure is None:
        raise error
    if type(failure) is type(error) and str(failure) == str(error):
        raise failure from failure.__cause__
    raise error.with_traceback(None) from failure


def first_told(
    records: Sequence[Sequence[str]], default: type[ZeroCkptError] = SaveError
) -> ZeroCkptError | None:
    """The error of the lowest rank that has one, naming that rank unless all have the same; None where none has.

    `records`: of all ranks in their order, as `to_record` makes them; empty for a rank without an error.
    """
    found = next((rank for rank, record in enumerate(records) if record), None)
    if found is None:
        return None
    name, text = records[found]
    same = all(record == records[found] for record in records)
    return by_name(name, text if same else f"rank {found}: {text}", default)


def by_name(name: str, message: str, default: type[ZeroCkptError] = SaveError) -> ZeroCkptError:
    """The error class called `name` with `message`; `default` for a class that is not ours."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, ZeroCkptError):
        return kind(message)
    return default(f"{name}: {message}" if name else message)
