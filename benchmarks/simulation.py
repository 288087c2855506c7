"""Checkpoints of thousands of ranks without their data: the tables, plans and manifests of a real save.

What a save at that scale would put into the manifest and into each shard file's header is computed by
the code that saves; only the bytes of the tensors are left out. So what rank 0 does at the commit, and
what any rank does to plan a load, can be measured on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from zero_ckpt.core.layout import ROLES, Layout, Mesh, Table
from zero_ckpt.core.manifest import MANIFEST_NAME, FileRecord, Manifest, shard_name
from zero_ckpt.core.planner import SavePlan, plan_save
from zero_ckpt.core.shard_file import ShardLayout, layout_shard

CHECKSUM = "0123456789abcdef" * 2
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Decoder:
    """The shapes of a decoder with grouped attention and biases: 12 tensors in each layer, 3 beside."""

    layers: int
    width: int
    heads_width: int  # of keys and values
    inner: int
    vocabulary: int

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(name, shape, how tensor parallelism splits it: "column", "row" or "")."""
        yield "embed.weight", (self.vocabulary, self.width), "column"
        for layer in range(self.layers):
            for name, shape, split in self._layer():
                yield f"layers.{layer}.{name}", shape, split
        yield "norm.weight", (self.width,), ""
        yield "head.weight", (self.vocabulary, self.width), "column"

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        for name, rows in (("q", self.width), ("k", self.heads_width), ("v", self.heads_width)):
            yield f"attention.{name}.weight", (rows, self.width), "column"
            yield f"attention.{name}.bias", (rows,), "column"
        yield "attention.out.weight", (self.width, self.width), "row"
        for name in ("gate", "up"):
            yield f"mlp.{name}.weight", (self.inner, self.width), "column"
        yield "mlp.down.weight", (self.width, self.inner), "row"
        for name in ("attention_norm", "mlp_norm"):
            yield f"{name}.weight", (self.width,), ""

    @property
    def params(self) -> int:
        return sum(prod(shape) for _, shape, _ in self.shapes())


MODELS = {
    "7B": Decoder(32, 4096, 4096, 11008, 32000),
    "70B": Decoder(80, 8192, 1024, 28672, 128256),
    "405B": Decoder(126, 16384, 1024, 53248, 128256),
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """A mesh over all ranks, row-major, and the placements of a tensor by how it is split."""

    name: str
    mesh: tuple[int, ...]
    placements: dict[str, tuple[str, ...]]

    @property
    def ranks(self) -> int:
        return prod(self.mesh)


def fsdp(ranks: int) -> Sharding:
    """FSDP2: every parameter split along dimension 0 over all ranks."""
    return Sharding("FSDP2", (ranks,), dict.fromkeys(("column", "row", ""), ("S0",)))


def hybrid(replicas: int, shards: int, tensor: int) -> Sharding:
    """FSDP2 with replicas, over tensor parallelism."""
    placements = {"column": ("R", "T0", "S0"), "row": ("R", "S0", "S1"), "": ("R", "S0", "R")}
    return Sharding("hybrid + tensor parallel", (replicas, shards, tensor), placements)


def table_of(model: Decoder, sharding: Sharding) -> Table:
    """Every rank's table: parameters in fp32, two moments of Adam, and its step, which all ranks hold."""
    mesh = Mesh(sharding.mesh, tuple(range(sharding.ranks)))
    step = Layout("F32", ())
    table = Table()
    known: dict[tuple[tuple[int, ...], str], Layout] = {}  # live tensors share them, too
    for name, shape, split in model.shapes():
        layout = known.setdefault(
            (shape, split), Layout("F32", shape, mesh, sharding.placements[split])
        )
        table.roles["model"][name] = layout
        table.roles["optim"][f"{name}/step"] = step
        for moment in MOMENTS:
            table.roles["optim"][f"{name}/{moment}"] = layout
    return table


class HeaderStorage:
    """Reads one tag of a checkpoint that was never written: its manifest, and headers of shard files.

    Files have the length and header that a save gives them, and zeroes in place of checksums of data,
    which nobody may read. Only files of the ranks in `opened` can be opened.
    """

    def __init__(self, table: Table, ranks: int, opened: Iterable[int]) -> None:
        plan = plan_save([(table, range(ranks))])
        self._headers: dict[str, bytes] = {}
        files = dict.fromkeys(shard_names(ranks), FileRecord(1 << 40, CHECKSUM))
        for rank in opened:
            for name, layout in _shard_layouts(table, plan, rank, ranks).items():
                files[name] = layout.record(bytes(8 * layout.num_blocks))
                self._headers[name] = layout.header
        self.manifest = Manifest("t", 1, ranks, 3, files=files, tensors=plan.roles)
        self._bytes = self.manifest.to_bytes()
        self._lengths = {name: record.nbytes for name, record in files.items()}

    def get(self, path: str, limit: int) -> bytes:
        if not path.endswith(MANIFEST_NAME):
            raise FileNotFoundError(path)
        return self._bytes

    def open(self, path: str) -> _Header:
        name = path.rpartition("/")[2]
        return _Header(self._headers[name], self._lengths[name])


@dataclass(frozen=True, slots=True)
class _Header:
    """An open file of which only the header and the block table can be read."""

    header: bytes
    nbytes: int

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        part = self.header[offset : offset + nbytes]
        buffer[:nbytes] = part + bytes(nbytes - len(part))

    def close(self) -> None:
        pass


def shard_names(ranks: int) -> list[str]:
    """All files of a checkpoint in which every rank has one of each role."""
    return [shard_name(role, rank, ranks, 1) for role in ROLES for rank in range(ranks)]


def _shard_layouts(table: Table, plan: SavePlan, rank: int, ranks: int) -> dict[str, ShardLayout]:
    """File name -> layout of what `rank` writes of the tensors."""
    found = {}
    for role, layouts in table.roles.items():
        chunks = [
            (key, layouts[key].dtype, layouts[key].shape, box)
            for key, box in plan.chunks_of(rank, role)
        ]
        if chunks:
            metadata = {"role": role, "rank": str(rank), "world_size": str(ranks), "tag": "t"}
            found[shard_name(role, rank, ranks, 1)] = layout_shard(chunks, metadata)
    return found
