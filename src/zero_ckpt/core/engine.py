"""The sync engine: one save from live state to a committed checkpoint, before it returns.

agree -> plan -> write (staging and hashing under way) -> vote and commit. Every rank gets the same outcome: a
handle, or the same error naming the rank that failed. Plans are reused while the tensors and their layouts stay as
they are.
"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from zero_ckpt.core import commit
from zero_ckpt.core.control import DEFAULT_TIMEOUT, ControlPlane, control_for_process_group
from zero_ckpt.core.layout import Table
from zero_ckpt.core.planner import SavePlan, plan_save
from zero_ckpt.core.saving import Captured, capture, plan_shards, write_shards
from zero_ckpt.core.staging import StagingPool
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.storage import LocalStorage, Storage

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
    """What one save carries from phase to phase."""

    captured: Captured
    agreement: commit.Agreement
    plan: SavePlan


class SyncEngine:
    """Saves checkpoints; one save at a time. `buffers` staging buffers of 4 MiB each are its extra memory."""

    def __init__(
        self,
        *,
        storage: Storage | None = None,
        control: ControlPlane | None = None,
        buffers: int = 4,
    ) -> None:
        self.storage: Storage = storage or LocalStorage()
        self.control: ControlPlane = control or control_for_process_group()
        self._buffers = buffers
        self._pool: StagingPool | None = None
        self._plans: dict[tuple[str, ...], SavePlan] = {}

    def save(
        self,
        directory: str | os.PathLike[str],
        tag: str,
        snapshot: Snapshot,
        *,
        step: int,
        zero_stage: int,
        save_latest: bool = True,
        keep_last: int | None = None,
        tag_validation: str = "warn",
        timeout: float | None = None,
    ) -> SaveHandle:
        """Collective: every rank calls it. Returns when the checkpoint is committed and durable.

        `timeout`: seconds of silence after which another rank counts as lost. Raises the same error on every rank:
        `SaveError`, `RankTimeoutError`, `DisagreementError`, `StateMismatchError` or `ConfigurationError`; then nothing
        was committed and earlier checkpoints are intact.
        """
        timeout = DEFAULT_TIMEOUT if timeout is None else timeout
        begin = time.perf_counter()
        session = self._prepare(
            os.path.abspath(os.fspath(directory)), tag, snapshot, tag_validation, timeout
        )
        planned = time.perf_counter()
        vote = self._write(session, step)
        timings = {"plan": planned - begin, **vote.timings}
        header = {
            "step": step,
            "zero_stage": zero_stage,
            "buffers": sorted(snapshot.buffers),
            "frozen": sorted(snapshot.frozen),
            "excluded": sorted(snapshot.excluded),
            "aliases": snapshot.aliases,
        }
        request = commit.CommitRequest(
            session.agreement, session.plan, header, save_latest, keep_last
        )
        voted = time.perf_counter()
        self._vote(request, vote, timeout)
        timings["commit"] = time.perf_counter() - voted
        return SaveHandle(session.agreement.folder, session.agreement.tag, timings)

    def _prepare(
        self, directory: str, tag: str, snapshot: Snapshot, tag_validation: str, timeout: float
    ) -> _Session:
        """Meet the others, and know what this rank has to write."""
        captured, problem = Captured(), []
        try:
            captured = capture(snapshot, self.control.rank)
        except Exception as error:
            problem = [type(error).__name__, str(error)]
        shared = sum(lay.nbytes for keys in captured.table.roles.values() for lay in keys.values())
        digest = captured.table.digest()
        proposal = commit.Proposal(directory, tag, digest, shared, captured.private_bytes, problem)
        answer = self.control.meet(
            "save: agree",
            proposal.to_bytes(),
            lambda records: commit.agree(self.storage, records, tag_validation).to_bytes(),
            timeout,
        )
        agreement = commit.Agreement.from_bytes(answer)
        if agreement.notice:
            warnings.warn(agreement.notice, stacklevel=4)
        return _Session(captured, agreement, self._plan(captured.table, digest, agreement, timeout))

    def _plan(
        self, table: Table, digest: str, agreement: commit.Agreement, timeout: float
    ) -> SavePlan:
        holders = agreement.holders
        if len(holders) == 1:
            known = (digest, str(holders))
            if known not in self._plans:
                self._plans = {known: plan_save([(table, holders[0])])}
            return self._plans[known]
        mine = any(ranks[0] == self.control.rank for ranks in holders)
        merged = self.control.meet(
            "save: tables",
            table.to_bytes() if mine else b"",
            lambda records: commit.merged_tables(records, holders),
            timeout,
        )
        return plan_save(list(zip(commit.parse_tables(merged), holders, strict=True)))

    def _write(self, session: _Session, step: int) -> commit.Vote:
        """Write this rank's files; an error becomes a vote against the commit."""
        agreement, control = session.agreement, self.control
        try:
            metadata = {"tag": agreement.tag, "step": str(step)}
            shards = plan_shards(
                session.captured,
                session.plan,
                control.rank,
                control.world_size,
                agreement.generation,
                metadata,
            )
            pool = self._staging_pool(session.captured)
            files, timings = write_shards(
                self.storage, agreement.folder, shards, pool, control.beat
            )
        except Exception as error:
            return commit.Vote(error=[type(error).__name__, _describe(error)])
        return commit.Vote(files, timings)

    def _vote(self, request: commit.CommitRequest, vote: commit.Vote, timeout: float) -> None:
        def decide(records: list[bytes]) -> bytes:
            commit.commit(self.storage, request, records)
            return b""

        try:
            self.control.meet("save: vote", vote.to_bytes(), decide, timeout)
        except TimeoutError:
            if self.control.rank == 0:
                commit.discard(self.storage, request.agreement, self.control.world_size)
            raise

    def _staging_pool(self, captured: Captured) -> StagingPool:
        if self._pool is None:
            cuda = any(_on_cuda(t) for keys in captured.tensors.values() for t in keys.values())
            self._pool = StagingPool(self._buffers, pinned=cuda)
        return self._pool


def _on_cuda(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_cuda


def _describe(error: BaseException) -> str:
    """An OSError's text names the file; others are told with their class."""
    if isinstance(error, OSError):
        return f"{error}. Nothing was committed; earlier checkpoints are intact."
    return str(error)
