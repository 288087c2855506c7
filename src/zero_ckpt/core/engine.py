"""The sync engine: one save from live state to a committed checkpoint, before it returns.

agree -> plan -> write (staging and hashing under way) -> vote and commit. Every rank gets the same outcome: a
handle, or the same error naming the rank that failed. Plans are reused while the tensors and their layouts stay as
they are.
"""

from __future__ import annotations

import operator
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from zero_ckpt.core import commit
from zero_ckpt.core.agreement import Agreement, Proposal, agree, merged_tables, parse_tables
from zero_ckpt.core.collector import collector_paused
from zero_ckpt.core.control import (
    DEFAULT_TIMEOUT,
    ControlPlane,
    control_for_process_group,
    process_group_store,
)
from zero_ckpt.core.planner import SavePlan, plan_save
from zero_ckpt.core.saving import Captured, capture, plan_shards, write_shards
from zero_ckpt.core.staging import StagingPool
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.storage import LocalStorage, Storage
from zero_ckpt.errors import ConfigurationError, ZeroCkptError, to_record

__all__ = ["SaveHandle", "SyncEngine"]


@dataclass(frozen=True, slots=True)
class SaveHandle:
    """A committed checkpoint: its folder, tag, and how long each phase took on this rank, in seconds."""

    path: str
    tag: str
    timings: dict[str, float]

    committed: bool = True


@dataclass(slots=True)
class _Session:
    """What one save carries from phase to phase. `failure`: why this rank cannot save."""

    timeout: float
    step: int = 0
    zero_stage: int = 0
    snapshot: Snapshot = field(default_factory=Snapshot)
    captured: Captured = field(default_factory=Captured)
    agreement: Agreement = field(init=False)
    plan: SavePlan = field(init=False)
    failure: BaseException | None = None


class SyncEngine:
    """Saves checkpoints; one save at a time. `buffers` staging buffers of 4 MiB each are its extra memory."""

    def __init__(
        self,
        *,
        storage: Storage | None = None,
        control: ControlPlane | None = None,
        buffers: int = 6,
    ) -> None:
        self.storage: Storage = storage or LocalStorage()
        self._given = control
        self._found: tuple[Any, ControlPlane] | None = None
        self._buffers = buffers
        self._pool: StagingPool | None = None
        self._plans: dict[tuple[str, ...], SavePlan] = {}
        if process_group_store() is not None:
            _ = (
                self.control
            )  # makes this rank known, so that its death is seen even before its first save

    @property
    def control(self) -> ControlPlane:
        """That of the process group that there is now: a group may be made after the engine, or anew."""
        if self._given is not None:
            return self._given
        store = process_group_store()
        if self._found is None or self._found[0] is not store:
            self._found = store, control_for_process_group()
        return self._found[1]

    @collector_paused()
    def save(
        self,
        directory: str | os.PathLike[str],
        tag: str,
        snapshot: Snapshot | Callable[[], Snapshot],
        *,
        step: int,
        zero_stage: int,
        save_latest: bool = True,
        keep_last: int | None = None,
        tag_validation: str = "warn",
        timeout: float | None = None,
    ) -> SaveHandle:
        """Collective: every rank calls it. Returns when the checkpoint is committed and durable.

        `snapshot` may be a function that makes it: what it raises on one rank is then raised on all. `timeout`: seconds
        of silence after which another rank counts as lost.

        Raises the same error on every rank: `SaveError`, `RankTimeoutError`, `DisagreementError`, `StateMismatchError`
        or `ConfigurationError`. Then nothing was committed, unless the message says otherwise, earlier checkpoints are
        intact, and the next save may succeed.
        """
        begin = time.perf_counter()
        session = _Session(DEFAULT_TIMEOUT if timeout is None else timeout)
        with _recording_failure(session):
            session.step = _count("step", step)
            session.zero_stage = _count("zero_stage", zero_stage)
            session.snapshot = snapshot() if callable(snapshot) else snapshot
        self._prepare(session, os.path.abspath(os.fspath(directory)), str(tag), tag_validation)
        planned = time.perf_counter()
        header = _header(session)
        vote = self._write(session, header)
        voted = time.perf_counter()
        notice = self._vote(session, vote, header, save_latest, keep_last)
        timings = {"plan": planned - begin, **vote.timings, "commit": time.perf_counter() - voted}
        # Only now: a warning that is made an error on some rank must not keep it from the others.
        for text in filter(None, [session.agreement.notice, notice]):
            warnings.warn(text, stacklevel=4)  # the decorator is a frame, too
        return SaveHandle(session.agreement.folder, session.agreement.tag, timings)

    def _prepare(
        self,
        session: _Session,
        directory: str,
        tag: str,
        tag_validation: str,
    ) -> None:
        """Meet the others, and know what this rank has to write."""
        with _recording_failure(session):
            session.captured = capture(session.snapshot, self.control.rank)
        captured = session.captured
        digest = captured.table.digest()
        proposal = Proposal(
            directory,
            tag,
            session.step,
            digest,
            shared_bytes=sum(
                x.nbytes for keys in captured.table.roles.values() for x in keys.values()
            ),
            private_bytes=captured.private_bytes,
            problem=_problem(session),
        )
        answer = self._meet(
            session,
            "save: agree",
            proposal.to_bytes(),
            lambda records: agree(self.storage, records, tag_validation).to_bytes(),
        )
        session.agreement = Agreement.from_bytes(answer)
        session.plan = self._plan(session, digest)

    def _meet(
        self, session: _Session, phase: str, record: bytes, decide: Callable[[list[bytes]], bytes]
    ) -> bytes:
        try:
            return self.control.meet(phase, record, decide, session.timeout)
        except ZeroCkptError as error:
            if session.failure is not None:
                raise error from session.failure  # the traceback that this rank has of its own problem
            raise

    def _plan(self, session: _Session, digest: str) -> SavePlan:
        holders, table = session.agreement.holders, session.captured.table
        if len(holders) == 1:
            known = (digest, str(holders))
            if known not in self._plans:
                self._plans = {known: plan_save([(table, holders[0])])}
            return self._plans[known]
        mine = any(ranks[0] == self.control.rank for ranks in holders)
        merged = self._meet(
            session,
            "save: tables",
            table.to_bytes() if mine else b"",
            lambda records: merged_tables(records, holders),
        )
        return plan_save(list(zip(parse_tables(merged), holders, strict=True)))

    def _write(self, session: _Session, header: Mapping[str, Any]) -> commit.Vote:
        """Write this rank's files; an error becomes a vote against the commit."""
        agreement, control = session.agreement, self.control
        try:
            metadata = {"tag": agreement.tag, "step": str(header["step"])}
            shards = plan_shards(
                session.captured,
                session.plan,
                control.rank,
                control.world_size,
                agreement.generation,
                metadata,
                header,
            )
            pool = self._staging_pool(session.captured)
            files, timings = write_shards(
                self.storage, agreement.folder, shards, pool, control.beat
            )
        except Exception as error:
            session.failure = error
            return commit.Vote(error=_problem(session))
        return commit.Vote(files, timings)

    def _vote(
        self,
        session: _Session,
        vote: commit.Vote,
        header: Mapping[str, Any],
        save_latest: bool,
        keep_last: int | None,
    ) -> str:
        """Commit, or raise on every rank. Returns a notice for the user, or ""."""
        agreement, control = session.agreement, self.control
        request = commit.CommitRequest(agreement, session.plan, header, save_latest, keep_last)

        def decide(records: list[bytes]) -> bytes:
            return commit.commit(self.storage, request, records).encode()

        try:
            return self._meet(session, "save: vote", vote.to_bytes(), decide).decode()
        except BaseException as error:
            # Another rank than 0 may remove its files only when it knows that rank 0 will not commit them.
            refused = isinstance(error, ZeroCkptError) and not getattr(
                error, "outcome_unknown", False
            )
            if control.rank == 0 or refused:
                ranks = range(control.world_size) if control.rank == 0 else [control.rank]
                commit.discard(self.storage, agreement, ranks, control.world_size)
            raise

    def _staging_pool(self, captured: Captured) -> StagingPool:
        if self._pool is None:
            cuda = any(_on_cuda(t) for keys in captured.tensors.values() for t in keys.values())
            self._pool = StagingPool(self._buffers, pinned=cuda)
        return self._pool


def _on_cuda(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_cuda


def _problem(session: _Session) -> list[str]:
    return to_record(session.failure) if session.failure is not None else []


@contextmanager
def _recording_failure(session: _Session) -> Iterator[None]:
    """What fails here is this rank's reason not to save, and is told at the next meeting. The first one counts."""
    try:
        yield
    except Exception as error:
        session.failure = session.failure or error


def _count(name: str, value: object) -> int:
    """A natural number of any integer type."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise ConfigurationError(f"{name} must be a natural number, found {value!r}")
    return number


def _header(session: _Session) -> dict[str, Any]:
    """What the manifest says of the snapshot as a whole."""
    snapshot = session.snapshot
    return {
        "step": session.step,
        "zero_stage": session.zero_stage,
        "buffers": sorted(snapshot.buffers),
        "frozen": sorted(snapshot.frozen),
        "excluded": sorted(snapshot.excluded),
        "aliases": snapshot.aliases,
    }
