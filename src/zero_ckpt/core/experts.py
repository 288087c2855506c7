"""Experts that live on different ranks: which of a layer's this rank has, and what ranks tell each other of theirs.

A `ModuleList` of local experts carries a `Share`: its entry `i` is expert `first + i` of `total`. So the experts of a
layer are one list in a checkpoint, whatever the ranks that hold them. Copies and pickles of the list keep the share.

Rank 0 writes notes on all tensors (which are buffers, frozen, tied), but has only its own experts: those on the others
it takes from the tables that they send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from zero_ckpt.errors import StateMismatchError

if TYPE_CHECKING:
    from zero_ckpt.core.layout import Table

__all__ = ["ExpertNotes", "Share", "merged_notes", "set_share", "share_of"]

_ATTRIBUTE = "_zero_ckpt_share"


@dataclass(frozen=True, slots=True)
class Share:
    """The experts `first .. first + count - 1` of a layer's `total`."""

    first: int
    count: int
    total: int

    def peers(self, number: int) -> range:
        """The experts in the place that expert `number` has on its rank, on all ranks."""
        return range(number % self.count, self.total, self.count)

    @property
    def own(self) -> range:
        return range(self.first, self.first + self.count)


def set_share(experts: Any, share: Share) -> None:
    """Declare what the entries of this `ModuleList` are."""
    setattr(experts, _ATTRIBUTE, share)


def share_of(module: Any) -> Share | None:
    """The share that a module was declared with; None for a module that is no declared list of experts.

    Raises `StateMismatchError` when the list has been given or has lost experts since.
    """
    share: Share | None = vars(module).get(_ATTRIBUTE)
    if share is not None and len(module) != share.count:
        raise StateMismatchError(
            f"a list of experts was declared with {share.count} on each rank and has {len(module)} now. Declare it "
            "anew, on every rank, after experts were added or removed."
        )
    return share


@dataclass(slots=True)
class ExpertNotes:
    """What one rank knows of its experts' tensors, by their names in the checkpoint.

    `shares`: path of a list, with a dot behind it -> `Share`. `groups`: a digest of how optimizers group parameters.
    """

    shares: dict[str, Share] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    groups: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ExpertNotes:
        shares = {path: Share(**share) for path, share in record["shares"].items()}
        return cls(**{**record, "shares": shares})


def merged_notes(tables: Sequence[Table], holders: Sequence[Sequence[int]]) -> ExpertNotes:
    """The notes of all ranks as one. `tables[i]` is the table of the ranks `holders[i]`.

    Raises `StateMismatchError` when ranks disagree on how many experts there are, when an expert is on no rank, or when
    ranks put the same parameters of their experts into other groups of an optimizer.
    """
    merged = ExpertNotes()
    notes = [table.experts for table in tables]
    for path in dict.fromkeys(path for each in notes for path in each.shares):
        _check_list(path, tables, holders)
    if len({each.groups for each in notes if each.shares}) > 1:
        raise StateMismatchError(
            "ranks put the parameters of their experts into different groups of an optimizer, so the groups of all "
            "experts are not known. Group the same places of every rank's lists of experts alike."
        )
    for each in notes:
        merged.buffers += each.buffers
        merged.frozen += each.frozen
        merged.excluded += each.excluded
        merged.aliases |= each.aliases
    return merged


def _check_list(path: str, tables: Sequence[Table], holders: Sequence[Sequence[int]]) -> None:
    """Checks that all ranks declare the list at `path`, with one total, and hold all of its experts between them."""
    name = path.rstrip(".")
    held: set[int] = set()
    totals: dict[int, int] = {}
    for table, ranks in zip(tables, holders, strict=True):
        share = table.experts.shares.get(path)
        if share is not None:
            totals.setdefault(share.total, ranks[0])
            held.update(share.own)
        elif any(key.startswith(path) for key in table.roles["model"]):
            raise StateMismatchError(
                f"'{name}' is a declared list of experts on some ranks, and not on rank {ranks[0]}. Declare it on "
                "every rank"
            )
    if len(totals) > 1:
        told = ", ".join(f"{total} on rank {rank}" for total, rank in totals.items())
        raise StateMismatchError(f"'{name}' has different numbers of experts on the ranks: {told}")
    missing = sorted(set(range(next(iter(totals)))) - held)
    if missing:
        raise StateMismatchError(
            f"'{name}' has {next(iter(totals))} experts, of which no rank holds {missing}: declare it over a mesh "
            "whose ranks all save"
        )
