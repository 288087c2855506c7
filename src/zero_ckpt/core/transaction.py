"""One save, from captured state to a committed checkpoint: agree -> plan -> write -> vote. The same for both engines.

`begin` looks at the live state, on the thread that trains, and never raises: what fails there is this rank's problem,
which all ranks learn at the next meeting. `finish` meets the others, stages, writes and commits, on any thread. Every
rank gets the same outcome: a folder and a tag, or the same error naming the rank that failed.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from zero_ckpt.core import commit
from zero_ckpt.core.agreement import Agreement, Proposal, agree, merged_tables, parse_tables
from zero_ckpt.core.buffers import StagingPool
from zero_ckpt.core.control import ControlPlane
from zero_ckpt.core.detach import Copies, Detached, detach
from zero_ckpt.core.experts import ExpertNotes, merged_notes
from zero_ckpt.core.lease import Lease
from zero_ckpt.core.planner import SavePlan, plan_save
from zero_ckpt.core.saving import Captured, ShardPlan, capture, plan_shards, write_shards
from zero_ckpt.core.staging import reading_after
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.storage import Storage
from zero_ckpt.errors import ConfigurationError, ZeroCkptError, raise_for, to_record

__all__ = ["Plans", "SaveRequest", "Transaction"]


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What a caller asks for. `timeout`: seconds of silence after which another rank counts as lost.

    `step`, `zero_stage`: checked by `Transaction.begin`, so that a wrong one is raised on every rank.
    """

    directory: str
    tag: str
    step: object
    zero_stage: object
    save_latest: bool
    keep_last: int | None
    tag_validation: str
    timeout: float


class Plans:
    """Keeps the last plan, which holds as long as tensors and layouts stay as they are."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], SavePlan] = {}

    def get(self, digest: str, captured: Captured, holders: list[int]) -> SavePlan:
        key = digest, str(holders)
        if key not in self._known:
            self._known = {key: plan_save([(captured.table, holders)])}
        return self._known[key]


@dataclass(slots=True)
class Transaction:
    """What one save carries from phase to phase. `failure`: why this rank cannot save.

    `pool_for` gives the staging buffers for what this rank is about to write. `staged` is called when all of it has
    been copied, so that the live tensors may change; `going_on` from time to time while files are written, and may
    raise to give the save up; `before_vote` when they are.
    """

    request: SaveRequest
    storage: Storage
    control: ControlPlane
    plans: Plans
    pool_for: Callable[[list[ShardPlan]], StagingPool]
    staged: Callable[[], None] = lambda: None
    going_on: Callable[[], None] = lambda: None
    before_vote: Callable[[], None] = lambda: None
    detached: Detached = field(default_factory=Detached)
    snapshot: Snapshot = field(default_factory=Snapshot)
    captured: Captured = field(default_factory=Captured)
    timings: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    failure: BaseException | None = None
    _header: dict[str, Any] = field(default_factory=dict)
    _agreement: Agreement = field(init=False)
    _lease: Lease = field(init=False)

    def __post_init__(self) -> None:
        self._lease = Lease(self.storage)

    def begin(self, snapshot: Snapshot | Callable[[], Snapshot]) -> None:
        """Capture references to the live tensors, and everything else by value."""
        with self._recording_failure():
            step = _count("step", self.request.step)
            stage = _count("zero_stage", self.request.zero_stage)
            self.snapshot = snapshot() if callable(snapshot) else snapshot
            self._header = {"step": step, "zero_stage": stage, **_described(self.snapshot)}
            self.captured = capture(self.snapshot, self.control.rank)

    def detach(self, copies: Copies, room: int, *, digests: bool) -> Detached:
        """After `begin`, when `finish` runs beside the training: copy now what may change before the next step."""
        with self._recording_failure():
            self.detached = detach(self.captured, self.snapshot, copies, room, digests=digests)
        return self.detached

    def finish(self) -> tuple[str, str]:
        """Collective. Returns (folder, tag) of the committed checkpoint, or raises the same error on every rank."""
        try:
            return self._finish()
        finally:
            self._lease.release()

    def _finish(self) -> tuple[str, str]:
        begin = time.perf_counter()
        plan = self._agree()
        planned = time.perf_counter()
        vote = self._write(plan)
        voted = time.perf_counter()
        notice = self._vote(plan, vote)
        self.timings |= {
            "plan": planned - begin,
            **vote.timings,
            "commit": time.perf_counter() - voted,
        }
        told = [self._agreement.notice, notice, self.captured.pickle_notice, *self.snapshot.notices]
        self.notices += filter(None, told)
        return self._agreement.folder, self._agreement.tag

    def _agree(self) -> SavePlan:
        """Meet the others, and know what each rank has to write."""
        captured, request = self.captured, self.request
        digest = captured.table.digest()
        tables = captured.table.roles.values()
        proposal = Proposal(
            request.directory,
            request.tag,
            self._header.get("step", 0),
            digest,
            shared_bytes=sum(x.nbytes for keys in tables for x in keys.values()),
            private_bytes=captured.private_bytes,
            problem=self._problem(),
            options=captured.options,
        )
        answer = self._meet(
            "save: agree",
            proposal.to_bytes(),
            lambda records: agree(
                self.storage, records, request.tag_validation, self._hold
            ).to_bytes(),
        )
        self._agreement = Agreement.from_bytes(answer)
        return self._plan(digest)

    def _hold(self, directory: str) -> bool:
        return self._lease.acquire(directory, self._progress)

    def _plan(self, digest: str) -> SavePlan:
        holders, table = self._agreement.holders, self.captured.table
        if len(holders) == 1:
            return self.plans.get(digest, self.captured, holders[0])
        mine = any(ranks[0] == self.control.rank for ranks in holders)
        merged = self._meet(
            "save: tables",
            table.to_bytes() if mine else b"",
            lambda records: merged_tables(records, holders),
        )
        tables = parse_tables(merged)
        self._header = _with_experts(self._header, merged_notes(tables, holders))
        return plan_save(list(zip(tables, holders, strict=True)))

    def _write(self, plan: SavePlan) -> commit.Vote:
        """Write this rank's files; an error becomes a vote against the commit."""
        agreement, control = self._agreement, self.control
        try:
            metadata = {"tag": agreement.tag, "step": str(self._header["step"])}
            shards = plan_shards(
                self.captured,
                plan,
                control.rank,
                control.world_size,
                agreement.generation,
                metadata,
                self._header,
            )
            with reading_after(self.detached.ready):
                files, timings = write_shards(
                    self.storage,
                    agreement.folder,
                    shards,
                    self.pool_for(shards),
                    self._progress,
                    self._all_staged,
                )
            self.before_vote()
        except Exception as error:
            self.failure = error
            return commit.Vote(error=self._problem())
        return commit.Vote(files, timings)

    def _progress(self) -> None:
        self.control.beat()
        self.going_on()

    def _all_staged(self) -> None:
        self.detached.check()
        self.staged()

    def _vote(self, plan: SavePlan, vote: commit.Vote) -> str:
        """Commit, or raise on every rank. Returns a notice for the user, or ""."""
        agreement, control = self._agreement, self.control
        request = commit.CommitRequest(
            agreement,
            plan,
            self._header,
            self.request.save_latest,
            self.request.keep_last,
            self._lease.check,
        )

        def decide(records: list[bytes]) -> bytes:
            try:
                return commit.commit(self.storage, request, records).encode()
            finally:
                self._lease.release()  # before any rank returns

        try:
            return self._meet("save: vote", vote.to_bytes(), decide).decode()
        except BaseException as error:
            # Another rank than 0 may remove its files only when it knows that rank 0 will not commit them.
            refused = isinstance(error, ZeroCkptError) and not getattr(
                error, "outcome_unknown", False
            )
            if control.rank == 0 or refused:
                ranks = range(control.world_size) if control.rank == 0 else [control.rank]
                commit.discard(self.storage, agreement, ranks, control.world_size)
            raise

    def _meet(self, phase: str, record: bytes, decide: Callable[[list[bytes]], bytes]) -> bytes:
        try:
            return self.control.meet(phase, record, decide, self.request.timeout)
        except ZeroCkptError as error:
            raise_for(error, self.failure)

    def _problem(self) -> list[str]:
        return to_record(self.failure) if self.failure is not None else []

    @contextmanager
    def _recording_failure(self) -> Iterator[None]:
        """Inside, an error becomes this rank's reason not to save, which the others learn at the next meeting."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error


def _count(name: str, value: object) -> int:
    """A natural number of any integer type."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise ConfigurationError(f"{name} must be a natural number, found {value!r}")
    return number


def _described(snapshot: Snapshot) -> dict[str, Any]:
    """The fields of the manifest that come from the snapshot."""
    return {
        "buffers": sorted(snapshot.buffers),
        "frozen": sorted(snapshot.frozen),
        "excluded": sorted(snapshot.excluded),
        "aliases": snapshot.aliases,
    }


def _with_experts(header: dict[str, Any], experts: ExpertNotes) -> dict[str, Any]:
    """`header` with what all ranks know of their experts, where ranks hold different ones."""
    return {
        **header,
        "buffers": sorted({*header["buffers"], *experts.buffers}),
        "frozen": sorted({*header["frozen"], *experts.frozen}),
        "excluded": sorted({*header["excluded"], *experts.excluded}),
        "aliases": {**header["aliases"], **experts.aliases},
    }
