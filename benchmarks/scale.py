"""`python -m benchmarks.scale`: what a checkpoint costs at sizes that no test machine has, as tables.

Bytes, files and messages are counted from the plans that a save of that size makes; seconds are these
counts times the constants below, which the suite measured on one machine (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.simulation import MODELS, fsdp, table_of
from zero_ckpt.core.layout import ROLES, Table
from zero_ckpt.core.manifest import FileRecord, Manifest, shard_name
from zero_ckpt.core.planner import SavePlan, plan_save
from zero_ckpt.core.store_control import longest_pause

RANKS = (8, 512, 4096, 16384)
RANKS_PER_HOST = 8
HOST_BYTES_PER_SECOND = 5e9  # what a host writes to or reads from the file system
COPY_BYTES_PER_SECOND = 5e9  # of one rank, into pageable host memory
STORE_CALL = 40e-6  # seconds of one call of rank 0 to the rendezvous store
FILE_CALL = (
    10e-6  # seconds of one stat or unlink of a local file; of a network file system 0.2 to 1 ms
)
RECORD = 100e-6  # seconds of rank 0 for the vote and manifest lines of one rank
MEETINGS = 2  # of a save: agree, vote
RANK_0_CALLS = 3  # to the store for each other rank and meeting: request, its deletion, answer
FOLLOWER_CALLS = 3  # of each other rank: request, answer, its deletion; looks come on top
STAGING_BUFFERS = 6 * (4 << 20)  # bytes per rank of a save that is not async


@dataclass(frozen=True, slots=True)
class Cost:
    """One model on one number of ranks, sharded by FSDP2, in fp32 with two moments of Adam."""

    model: str
    ranks: int
    rank_bytes: int  # of the rank with the most
    least_bytes: int
    files: int
    manifest_bytes: int

    @property
    def messages(self) -> int:
        """Calls of all ranks to the store in a save, but for looks whether something is there yet."""
        return MEETINGS * (self.ranks - 1) * (RANK_0_CALLS + FOLLOWER_CALLS)

    @property
    def rank_0_seconds(self) -> float:
        """Of rank 0 for the others: its calls to the store one by one, votes, one look at every file."""
        store = MEETINGS * (self.ranks - 1) * RANK_0_CALLS * STORE_CALL
        return store + self.ranks * RECORD + self.files * FILE_CALL

    @property
    def write_seconds(self) -> float:
        hosts_rank = min(self.ranks, RANKS_PER_HOST)
        return self.rank_bytes * hosts_rank / HOST_BYTES_PER_SECOND


def cost(model: str, ranks: int) -> Cost:
    table = table_of(MODELS[model], fsdp(ranks))
    plan = plan_save([(table, range(ranks))])
    written = [_bytes(table, plan, rank) for rank in _sample(ranks)]
    holders = {role: _holders(plan, role) for role in ROLES}
    names = [shard_name("state", rank, ranks, 1) for rank in range(ranks)]
    names += [shard_name(role, rank, ranks, 1) for role in holders for rank in holders[role]]
    files = dict.fromkeys(names, FileRecord(max(written) + 4096, "0" * 32))
    manifest = Manifest("t", 1, ranks, 3, files=files, tensors=plan.roles)
    size = len(manifest.to_bytes())
    return Cost(model, ranks, max(written), min(written), len(files), size)


def _sample(ranks: int) -> Iterable[int]:
    """Ranks that differ: the first, which also hold what is tiny, and the last, whose parts are short or empty."""
    return sorted({0, 1, ranks // 2, *range(max(0, ranks - 8), ranks)})


def _bytes(table: Table, plan: SavePlan, rank: int) -> int:
    return sum(box.numel * 4 for role in table.roles for _, box in plan.chunks_of(rank, role))


def _holders(plan: SavePlan, role: str) -> set[int]:
    distinct = {id(placed): placed for placed in plan.roles[role].values()}
    return {rank for placed in distinct.values() for run in placed.runs for rank in run.ranks()}


SIZES = ("ranks", "GB per rank, most", "least", "files", "manifest", "staging of an async save")
TIMES = ("ranks", "copy", "write, or read", "store calls", "rank 0", "looks at the store")


def main() -> None:
    for model in MODELS:
        costs = [cost(model, ranks) for ranks in RANKS]
        print(f"**{model}**, {MODELS[model].params / 1e9:.1f} billion parameters\n")
        _table(SIZES, [_sizes(each) for each in costs])
        _table(TIMES, [_times(each) for each in costs])


def _sizes(each: Cost) -> tuple[str, ...]:
    return (
        f"{each.ranks:,}",
        f"{each.rank_bytes / 1e9:.3g}",
        f"{each.least_bytes / 1e9:.3g}",
        f"{each.files:,}",
        f"{each.manifest_bytes / 1e6:.2g} MB",
        f"{each.rank_bytes / 1e9:.3g} GB per rank",
    )


def _times(each: Cost) -> tuple[str, ...]:
    return (
        f"{each.ranks:,}",
        f"{each.rank_bytes / COPY_BYTES_PER_SECOND:.2g} s",
        f"{each.write_seconds:.2g} s",
        f"{each.messages:,}",
        f"{each.rank_0_seconds:.2g} s",
        f"every {longest_pause(each.ranks):.2g} s",
    )


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    for line in (headings, ("---",) * len(headings), *rows):
        print(f"| {' | '.join(line)} |")
    print()


if __name__ == "__main__":
    main()
