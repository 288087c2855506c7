"""A load that all ranks make together: same checkpoint, all or nothing, same outcome.

1. open      rank 0 resolves the path once and names the folder
2. planned   every rank knows what it has to read; what is the same on all (replicas) is verified in shares
3. verified  every rank has filled what is new, and verified every byte that will overwrite live tensors
4. done      live tensors are filled, new state is installed

When a rank cannot plan or verify, all raise, or go on to the next older checkpoint when none was named. So a damaged or
unfitting checkpoint changes nothing on any rank. (`verify_first=False` trades that for speed.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.collector import collector_paused
from zero_ckpt.core.consequences import TORN
from zero_ckpt.core.control import ControlPlane, meet_json
from zero_ckpt.core.fence import await_staged
from zero_ckpt.core.finding import Candidates, Found, fallback_notice, find_checkpoint, locate
from zero_ckpt.core.memory import free_share
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.places import absolute
from zero_ckpt.core.reader import Sharing
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import was_replaced
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    CorruptManifestError,
    CorruptShardError,
    DisagreementError,
    NothingSavedError,
    ZeroCkptError,
    first_told,
    raise_for,
    to_record,
)

__all__ = ["Loaded", "load_together"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """The opened checkpoint and what the caller's `prepare` made of it."""

    checkpoint: Checkpoint
    prepared: T


@collector_paused()
def load_together(
    storage: Storage,
    control: ControlPlane,
    path: str | os.PathLike[str],
    tag: str | None,
    prepare: Callable[[Checkpoint], tuple[Restoration, T]],
    *,
    verify_first: bool = True,
    timeout: float | None = None,
) -> Loaded[T]:
    """Collective. `prepare` runs on every rank and only plans; it may raise, and then every rank raises the same.

    `verify_first` False leaves out the pass over the bytes that will overwrite live tensors: each block is verified
    just before it is copied. That saves a pass over the page cache; damage found on the way then leaves live
    tensors partly overwritten, and the error says so.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `StateMismatchError`, `FormatVersionError`,
    `UnsafeObjectError`, `DisagreementError` or `RankTimeoutError`.
    """
    session = _Session(storage, control, absolute(path), tag, timeout)
    while True:
        folder, notice = session.choose()
        found = session.attempt(folder, prepare, verify_first)
        if found is None:
            continue
        warn_on_first(control.rank, [notice])
        return found


class _Session:
    """One load's meetings, and on rank 0 the checkpoints still to try."""

    def __init__(
        self,
        storage: Storage,
        control: ControlPlane,
        path: str,
        tag: str | None,
        timeout: float | None,
    ) -> None:
        self._storage, self._control, self._timeout = storage, control, timeout
        self._path, self._tag = path, tag
        self._candidates: Candidates | None = None
        self._found: Found | None = None

    def choose(self) -> tuple[str, str]:
        """The folder of the next checkpoint to try, the same on every rank, and a notice for the user."""
        answer = self._meet("load: open", [self._path, self._tag], self._choose)
        return answer["folder"], answer["notice"]

    def attempt(
        self,
        folder: str,
        prepare: Callable[[Checkpoint], tuple[Restoration, T]],
        verify_first: bool,
    ) -> Loaded[T] | None:
        """Load the checkpoint in `folder`; None when it is damaged and another one may be tried."""
        failure: Exception | None = None
        digests: list[dict[str, str]] = []
        with ExitStack() as unless_loaded:
            try:
                checkpoint = unless_loaded.enter_context(Checkpoint(self._storage, folder))
                plan, prepared = prepare(checkpoint)
                live, fresh = map(checkpoint.plan_reads, (plan.live, plan.fresh))
                digests = [live.digests(), fresh.digests()]
            except Exception as error:
                failure = error
            record = [_problem(failure), digests]
            answer = self._meet("load: planned", record, self._judge_plans, failure)
            if answer["try_next"]:
                failure = None  # it holds this frame, and so what was read
                return None
            beat = self._control.beat
            shared_live, shared_fresh = map(self._sharing, answer["shared"])
            try:
                if verify_first:
                    live.verify(beat, shared_live, free_share(self._control.world_size))
                fresh.fill(beat, shared_fresh, private=True)
                plan.check()
            except Exception as error:
                failure = error
            if self._meet("load: verified", _problem(failure), self._judge, failure)["try_next"]:
                failure = None
                return None
            try:
                await_staged()
                live.fill(beat, shared_live, verified=verify_first)
                plan.install()
            except Exception as error:
                failure = error
            self._meet("load: done", _problem(failure), _raise_torn, failure)
            unless_loaded.pop_all()
        return Loaded(checkpoint, prepared)

    def _sharing(self, roles: list[str]) -> Sharing | None:
        """How this rank shares the verification of `roles`, of which all ranks read the same blocks."""
        rank, world_size = self._control.rank, self._control.world_size
        return Sharing(rank, world_size, frozenset(roles)) if world_size > 1 else None

    def _meet(
        self,
        phase: str,
        record: Any,
        decide: Callable[[list[Any]], dict[str, Any]],
        failure: Exception | None = None,
    ) -> dict[str, Any]:
        """Meet; `failure`: this rank's own problem, whose traceback is shown with the error that all ranks raise."""
        try:
            found: dict[str, Any] = meet_json(self._control, phase, record, decide, self._timeout)
        except ZeroCkptError as error:
            raise_for(error, failure)
        return found

    def _choose(self, asked: list[Any]) -> dict[str, Any]:
        """Rank 0: the next checkpoint whose manifest and file lengths verify."""
        self._check_same(asked)
        if self._candidates is not None:
            found = self._candidates.next()
        else:
            directory, named = locate(self._storage, self._path, self._tag)
            if named is None:
                self._candidates = Candidates(self._storage, directory)
                found = self._candidates.next()
            else:
                found = find_checkpoint(self._storage, directory, named)
        self._found = found
        notice = fallback_notice(found.problems, found.folder) if found.problems else ""
        return {"folder": found.folder, "notice": notice}

    def _check_same(self, asked: Sequence[Any]) -> None:
        odd = {rank: record for rank, record in enumerate(asked) if record != asked[0]}
        if odd:
            shown = [f"rank {rank}: {_asked(*record)}" for rank, record in list(odd.items())[:4]]
            raise DisagreementError(
                f"ranks were asked to load different checkpoints: rank 0: {_asked(*asked[0])}; {'; '.join(shown)}. "
                "Nothing was loaded. Pass the same path and tag on every rank."
            )

    def _judge_plans(self, records: list[Any]) -> dict[str, Any]:
        """Rank 0: as `_judge`; and the roles of which all ranks read the same, for live and for fresh reads."""
        answer = self._judge([problem for problem, _ in records])
        if answer["try_next"]:
            return answer
        plans = zip(*(digests for _, digests in records), strict=True)
        return {**answer, "shared": [_common(digests) for digests in plans]}

    def _judge(self, problems: list[Any]) -> dict[str, Any]:
        """Rank 0: go on, try an older checkpoint, or raise."""
        error = first_told(problems, ZeroCkptError)
        if error is None:
            return {"try_next": False}
        kinds = {name for name, _ in filter(None, problems)}
        if "" in kinds:
            raise type(error)(f"{str(error).rstrip('. ')}. Nothing was loaded.")
        if kinds - _DAMAGE - _GONE:
            raise error
        assert self._found is not None
        if was_replaced(self._storage, self._found.folder, self._found.manifest):
            self._candidates = None  # begin anew
        elif isinstance(error, CheckpointNotFoundError):
            raise DisagreementError(
                f"rank 0 has found a checkpoint in {self._found.folder}, but {error}. Nothing was loaded. Every rank "
                "must see the same directory."
            )
        elif self._candidates is None or not isinstance(error, CorruptCheckpointError):
            raise error
        else:
            self._candidates.reject(error)
        return {"try_next": True}


_DAMAGE = {
    kind.__name__ for kind in (CorruptCheckpointError, CorruptManifestError, CorruptShardError)
}

_GONE = {kind.__name__ for kind in (CheckpointNotFoundError, NothingSavedError)}


def _common(digests: Sequence[Mapping[str, str]]) -> list[str]:
    """The roles whose digests are the same on all ranks."""
    first = digests[0]
    return [role for role in first if all(each.get(role) == first[role] for each in digests)]


def _asked(path: str, tag: str | None) -> str:
    return f"'{path}'" if tag is None else f"tag '{tag}' of '{path}'"


def _problem(failure: Exception | None) -> list[str]:
    return [] if failure is None else to_record(failure)


def _raise_torn(problems: list[Any]) -> dict[str, Any]:
    """Raise the first problem of the step that overwrites."""
    if (error := first_told(problems, ZeroCkptError)) is not None:
        raise type(error)(f"{str(error).rstrip('. ')}. {TORN}")
    return {}
