"""A load that all ranks make together: same checkpoint, all or nothing, same outcome.

1. open      rank 0 resolves the path once and names the folder
2. verified  every rank has planned its reads, filled what is new, and verified every byte that will overwrite live
             tensors; if any rank could not, all raise, or go on to the next older checkpoint when none was named
3. done      live tensors are filled, new state is installed

So a damaged or unfitting checkpoint changes nothing on any rank.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.control import DEFAULT_TIMEOUT, ControlPlane
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tags import (
    candidates,
    check_files,
    fallback_notice,
    locate,
    no_checkpoint,
    read_manifest,
)
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DisagreementError,
    by_name,
)

__all__ = ["Loaded", "load_together"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """The opened checkpoint and what the caller's `prepare` made of it."""

    checkpoint: Checkpoint
    prepared: T


def load_together(
    storage: Storage,
    control: ControlPlane,
    path: str | os.PathLike[str],
    tag: str | None,
    prepare: Callable[[Checkpoint], tuple[Restoration, T]],
    *,
    timeout: float | None = None,
) -> Loaded[T]:
    """Collective. `prepare` runs on every rank and only plans; it may raise, and then every rank raises the same.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, `StateMismatchError`, `FormatVersionError`,
    `UnsafeObjectError`, `DisagreementError` or `RankTimeoutError`.
    """
    timeout = DEFAULT_TIMEOUT if timeout is None else timeout
    session = _Session(storage, control, os.path.abspath(os.fspath(path)), tag, timeout)
    while True:
        checkpoint = session.open_next()
        try:
            found = session.attempt(checkpoint, prepare)
        except BaseException:
            checkpoint.close()
            raise
        if found is not None:
            return found
        checkpoint.close()


class _Session:
    """One load's meetings, and on rank 0 the checkpoints still to try."""

    def __init__(
        self, storage: Storage, control: ControlPlane, path: str, tag: str | None, timeout: float
    ) -> None:
        self._storage, self._control, self._timeout = storage, control, timeout
        self._path, self._tag = path, tag
        self._names: Iterator[str] | None = None
        self._directory, self._implied = "", True
        self._problems: list[str] = []

    def open_next(self) -> Checkpoint:
        """The next checkpoint to try, the same on every rank."""
        answer = self._meet("load: open", [self._path, self._tag], self._choose)
        if answer["notice"]:
            warnings.warn(answer["notice"], stacklevel=5)
        return Checkpoint(self._storage, answer["folder"])

    def attempt(
        self, checkpoint: Checkpoint, prepare: Callable[[Checkpoint], tuple[Restoration, T]]
    ) -> Loaded[T] | None:
        problem: list[str] = []
        try:
            plan, prepared = prepare(checkpoint)
            live = checkpoint.plan_reads(plan.live)
            live.verify(self._control.beat)
            checkpoint.read(plan.fresh, self._control.beat)
        except Exception as error:
            problem = _problem(error)
        if self._meet("load: verified", problem, self._judge)["next"]:
            return None
        try:
            live.fill(self._control.beat, verified=True)
        except Exception as error:
            problem = _problem(error)
        self._meet("load: done", problem, _raise_first)
        plan.install()
        return Loaded(checkpoint, prepared)

    def _meet(
        self, phase: str, record: Any, decide: Callable[[list[Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        def answer(records: list[bytes]) -> bytes:
            return json.dumps(decide([json.loads(r) for r in records])).encode()

        data = json.dumps(record).encode()
        found: dict[str, Any] = json.loads(self._control.meet(phase, data, answer, self._timeout))
        return found

    def _choose(self, asked: list[Any]) -> dict[str, Any]:
        """Rank 0: the next folder whose manifest and file lengths verify."""
        self._check_same(asked)
        if self._names is None:
            self._directory, named = locate(self._storage, self._path, self._tag)
            self._implied = named is None
            names = candidates(self._storage, self._directory) if named is None else iter([named])
            self._names = names
        for name in self._names:
            folder = f"{self._directory}/{name}"
            try:
                check_files(self._storage, folder, read_manifest(self._storage, folder))
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                if not self._implied:
                    raise
                self._problems.append(str(error))
                continue
            notice = fallback_notice(self._problems, folder) if self._problems else ""
            return {"folder": folder, "notice": notice}
        raise no_checkpoint(self._storage, self._directory, self._problems)

    def _check_same(self, asked: Sequence[Any]) -> None:
        odd = {rank: record for rank, record in enumerate(asked) if record != asked[0]}
        if odd:
            shown = "; ".join(f"rank {rank}: {record}" for rank, record in list(odd.items())[:4])
            raise DisagreementError(
                f"ranks were asked to load different checkpoints: rank 0: {asked[0]}; {shown}. "
                "Pass the same path and tag on every rank."
            )

    def _judge(self, problems: list[Any]) -> dict[str, Any]:
        """Rank 0: go on, try an older checkpoint, or raise."""
        found = [problem for problem in problems if problem]
        damaged = found and all(
            issubclass(type(by_name(*problem)), CorruptCheckpointError) for problem in found
        )
        if damaged and self._implied:
            self._problems.append(_first(problems))
            return {"next": True}
        _raise_first(problems)
        return {"next": False}


def _problem(error: BaseException) -> list[str]:
    return [type(error).__name__, str(error)]


def _raise_first(problems: list[Any]) -> dict[str, Any]:
    found = [problem for problem in problems if problem]
    if found:
        raise by_name(found[0][0], _first(problems))
    return {}


def _first(problems: Sequence[Any]) -> str:
    """The first problem's text; says which rank, unless all ranks have the same."""
    rank, text = next((r, p[1]) for r, p in enumerate(problems) if p)
    return text if all(p == problems[rank] for p in problems) else f"rank {rank}: {text}"
