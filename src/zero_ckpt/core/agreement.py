"""What the ranks of a save agree on before anything is written: where to, which generation, and who holds what.

Pure but for a look at the checkpoint directory: its free space, and the generation that is committed there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from zero_ckpt.core.layout import Table
from zero_ckpt.core.manifest import parse_shard_name
from zero_ckpt.core.options import options_notice
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import read_manifest
from zero_ckpt.core.tags import check_tag
from zero_ckpt.core.watch import name_ranks
from zero_ckpt.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    DisagreementError,
    FormatVersionError,
    SaveError,
    ZeroCkptError,
    by_name,
)

__all__ = [
    "Agreement",
    "Proposal",
    "agree",
    "check_tag_validation",
    "merged_tables",
    "parse_tables",
    "place_notice",
    "raise_problems",
]

TAG_VALIDATION = ("ignore", "warn", "fail")


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one rank brings to the first meeting.

    `digest`: of its table of tensors. `shared_bytes`: of all tensors in that table, of which other ranks write parts.
    `private_bytes`: of what this rank stores for itself. `problem`: why it cannot save, as `errors.to_record` has it.
    `options`: see `digests_of_options`.
    """

    directory: str
    tag: str
    step: int
    digest: str
    shared_bytes: int
    private_bytes: int
    problem: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return json.dumps([getattr(self, n) for n in self.__dataclass_fields__]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Proposal:
        return cls(*json.loads(data))


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks do: `holders` lists, for each distinct table, the ranks that have it, ascending."""

    directory: str
    tag: str
    generation: int
    holders: list[list[int]]
    notice: str = ""

    def to_bytes(self) -> bytes:
        """Short, however many ranks there are: every one of them gets it from the store."""
        rows = [_rows(ranks) for ranks in self.holders]
        return json.dumps([self.directory, self.tag, self.generation, rows, self.notice]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Agreement:
        directory, tag, generation, rows, notice = json.loads(data)
        holders = [[rank for row in ranks for rank in range(*row)] for ranks in rows]
        return cls(directory, tag, generation, holders, notice)

    @property
    def folder(self) -> str:
        return f"{self.directory}/{self.tag}"


def _rows(ranks: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as (start, stop, step) of ranges that hold them in order."""
    rows: list[list[int]] = []
    for rank in ranks:
        if rows and len(range(*rows[-1])) == 1:
            rows[-1][1:] = [rank + 1, rank - rows[-1][0]]
        elif rows and rank == range(*rows[-1])[-1] + rows[-1][2]:
            rows[-1][1] = rank + 1
        else:
            rows.append([rank, rank + 1, 1])
    return rows


def agree(
    storage: Storage,
    records: Sequence[bytes],
    tag_validation: str,
    hold: Callable[[str], bool],
) -> Agreement:
    """Rank 0's answer to the proposals. Raises what all ranks shall raise.

    `hold(directory)` keeps other jobs out, and is called before the first look at what they may change. It returns
    whether files there may still be written to by a job that is not known to have ended.
    """
    proposals = [Proposal.from_bytes(record) for record in records]
    raise_problems(p.problem for p in proposals)
    first = proposals[0]
    place = place_notice([(p.directory, p.tag) for p in proposals], tag_validation)
    notice = "\n".join(filter(None, [place, options_notice([p.options for p in proposals])]))
    _check_steps(proposals)
    tag = check_tag(first.tag)
    holders: dict[str, list[int]] = {}
    for rank, proposal in enumerate(proposals):
        holders.setdefault(proposal.digest, []).append(rank)
    # What different tables have in common is not known yet: at least the largest is written.
    shared = max(p.shared_bytes for p in proposals)
    _check_space(storage, first.directory, shared + sum(p.private_bytes for p in proposals))
    is_new = _check_place(storage, first.directory, tag)
    others_may_write = hold(first.directory)
    generation = 1
    # To look for a manifest that is not there would list all other tags, for the error's text.
    if not is_new:
        generation = _next_generation(storage, f"{first.directory}/{tag}", others_may_write)
    generation += others_may_write  # that job may have agreed upon this one, and not begun with it
    return Agreement(first.directory, tag, generation, list(holders.values()), notice)


def raise_problems(problems: Iterable[Sequence[str]]) -> None:
    """Raise the lowest rank's problem, if there is any; says which ranks have one, unless all have the same."""
    told = list(problems)
    found = [rank for rank, problem in enumerate(told) if problem]
    if not found:
        return
    name, text = told[found[0]]
    if any(problem != told[0] for problem in told):
        others = f" (and {name_ranks(found[1:])})" if len(found) > 1 else ""
        text = f"rank {found[0]}{others}: {text}"
    raise by_name(
        name, f"{text.rstrip('.')}. Nothing was committed; earlier checkpoints are intact."
    )


def place_notice(places: Sequence[tuple[str, str]], tag_validation: str) -> str:
    """A sentence about ranks whose (directory, tag) is not rank 0's, "" where there are none.

    Raises `DisagreementError` in mode `fail`.
    """
    first = "/".join(places[0])
    odd = {rank: "/".join(place) for rank, place in enumerate(places) if place != places[0]}
    if not odd or tag_validation == "ignore":
        return ""
    shown = ", ".join(f"rank {rank}: '{path}'" for rank, path in list(odd.items())[:4])
    message = f"ranks were given different tags or directories: rank 0: '{first}', {shown}. "
    if tag_validation == "fail":
        raise DisagreementError(
            message
            + "Nothing was written. Pass the same on every rank, or tag_validation='warn' for rank 0's."
        )
    return message + "All ranks save to rank 0's."


def _check_steps(proposals: Sequence[Proposal]) -> None:
    """A rank that comes late, from a call that the others gave up on, brings the state of another step."""
    steps = {rank: proposal.step for rank, proposal in enumerate(proposals)}
    odd = {rank: step for rank, step in steps.items() if step != steps[0]}
    if odd:
        shown = ", ".join(f"rank {rank} at step {step}" for rank, step in list(odd.items())[:4])
        raise DisagreementError(
            f"ranks save different steps: rank 0 at step {steps[0]}, {shown}. Nothing was committed; earlier "
            "checkpoints are intact. Save after the same step on every rank."
        )


def _check_space(storage: Storage, directory: str, needed: int) -> None:
    free = storage.free_bytes(directory)
    if free is not None and needed > free:
        raise SaveError(
            f"{directory}: the checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. Nothing was "
            "written. Make room, or keep fewer checkpoints."
        )


def _check_place(storage: Storage, directory: str, tag: str) -> bool:
    """Whether nothing has this name yet. A link to another checkpoint's folder would lead the save into that."""
    try:
        entries = storage.list(directory)
    except FileNotFoundError:
        return True
    if any(entry.name == tag and not entry.is_dir for entry in entries):
        raise SaveError(
            f"{directory}/{tag}: a file or a link, where the tag's folder belongs. Nothing was written. Remove it, or "
            "use another tag."
        )
    return all(entry.name != tag for entry in entries)


def _next_generation(storage: Storage, folder: str, above_all_files: bool) -> int:
    """One more than the committed generation of a tag that is overwritten; 1 where nothing is committed.

    `above_all_files`: above the generation of every shard file there, whether a manifest lists it or not.
    """
    try:
        committed = read_manifest(storage, folder).generation
    except (CorruptCheckpointError, FormatVersionError):
        committed, above_all_files = 0, True
    except ZeroCkptError:
        committed = 0
    return 1 + max(committed, _highest_generation(storage, folder) if above_all_files else 0)


def _highest_generation(storage: Storage, folder: str) -> int:
    try:
        entries = storage.list(folder)
    except FileNotFoundError:
        return 0
    shards = filter(None, (parse_shard_name(entry.name) for entry in entries))
    return max((generation for *_, generation in shards), default=0)


def merged_tables(records: Sequence[bytes], holders: Sequence[Sequence[int]]) -> bytes:
    """Rank 0's answer in the second meeting: each distinct table once, in the order of `holders`."""
    return b"\n".join(records[ranks[0]] for ranks in holders)


def parse_tables(data: bytes) -> list[Table]:
    return [Table.from_bytes(part) for part in data.split(b"\n")]


def check_tag_validation(mode: str) -> str:
    if mode not in TAG_VALIDATION:
        raise ConfigurationError(f"tag_validation must be one of {TAG_VALIDATION}, found {mode!r}")
    return mode
