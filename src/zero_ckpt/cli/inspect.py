"""`zero-ckpt inspect PATH`: what one checkpoint holds: tensors, files, who owns what, client state."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from math import prod
from typing import Any

from zero_ckpt.cli.groups import Group, group_names
from zero_ckpt.cli.text import (
    age_text,
    count_text,
    duration_text,
    iso_time,
    json_text,
    listing,
    local_time,
    placement_text,
    plural,
    printable,
    ranks_text,
    size_text,
    table,
)
from zero_ckpt.core.finding import fallback_notice, find_checkpoint, locate
from zero_ckpt.core.foreign import ForeignManifest
from zero_ckpt.core.layout import ROLES
from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.core.planner import Placed
from zero_ckpt.core.shard_file import REMEDY
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import check_files, read_tag, was_replaced
from zero_ckpt.errors import CorruptCheckpointError, CorruptShardError

SUMMARY = "show what one checkpoint holds"
DESCRIPTION = """\
Shows a checkpoint's tensors, files, and which ranks' files hold what; then client state and the other objects, with
pickled values as <pickled type>. Runs no code from the checkpoint. For a checkpoint directory: its latest."""
EXAMPLES = """\
  zero-ckpt inspect checkpoints
  zero-ckpt inspect checkpoints/global_step100 --full | less
  zero-ckpt inspect checkpoints --json | jq .objects.client_state"""

MAX_NAMES = 6
"""Tied or left-out names that are shown, unless all are asked for."""

_PHASES = {"plan": 0, "stage": 1, "write": 2, "fsync": 3, "commit": 4}
_TITLES = {"model": "MODEL", "optim": "OPTIMIZER STATE", "state": "TENSORS OF THE OBJECTS"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a tag's folder, or a checkpoint directory")
    parser.add_argument(
        "--full",
        action="store_true",
        help="every tensor with its chunks, every file, all objects of all ranks",
    )


def run(options: argparse.Namespace) -> int:
    storage = AnyStorage()
    while True:
        folder, manifest = _open(storage, options.path)
        shown, problems = _shown(storage, folder, manifest, options)
        if not (problems and was_replaced(storage, folder, manifest)):
            break
    print(shown)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        text = f"{problems[0].removesuffix(REMEDY).rstrip()}{more} 'zero-ckpt verify' lists all damage."
        print(f"zero-ckpt inspect: damaged: {printable(text)}", file=sys.stderr)
    return int(bool(problems))


def _shown(
    storage: Storage, folder: str, manifest: Manifest, options: argparse.Namespace
) -> tuple[str, list[str]]:
    """What is printed, and the damage that was met."""
    problems: list[str] = []
    try:
        check_files(storage, folder, manifest)
    except CorruptCheckpointError as error:
        problems.append(str(error))
    if options.json:
        return json_text(_document(storage, folder, manifest, options.full, problems)), problems
    return "\n".join(_lines(storage, folder, manifest, options.full, problems)), problems


def _open(storage: Storage, path: str) -> tuple[str, Manifest]:
    """A folder named by the user is shown even when files are damaged; `latest` falls back as a load does."""
    place = absolute(path)
    directory, tag = locate(storage, place, None)
    if tag is not None:
        folder = f"{directory}/{tag}"
        return folder, read_tag(storage, folder)
    found = find_checkpoint(storage, place)
    if found.problems:
        notice = printable(fallback_notice(found.problems, found.folder))
        print(f"zero-ckpt inspect: {notice}", file=sys.stderr)
    return found.folder, found.manifest


def _lines(
    storage: Storage, folder: str, m: Manifest, full: bool, problems: list[str]
) -> Iterator[str]:
    yield printable(folder)
    yield ""
    yield from _summary(m, None if full else MAX_NAMES)
    yield ""
    yield from _file_lines(m, full)
    for role in ROLES:
        if m.tensors[role]:
            yield ""
            yield from _tensor_lines(m, role, full)
    for rank in _state_ranks(m)[: None if full else 1]:
        yield from _object_lines(storage, folder, m, rank, full, problems)


def _summary(m: Manifest, limit: int | None) -> Iterator[str]:
    tied = [f"{alias} = {key}" for alias, key in m.aliases.items()]
    rows = {
        "format": m.format if isinstance(m, ForeignManifest) else "",
        "step": str(m.step),
        "saved": f"{local_time(m.created)} ({age_text(m.created)})",
        "ZeRO stage": str(m.zero_stage),
        "world size": str(m.world_size),
        "size": f"{size_text(m.nbytes)} in {plural(len(m.files), 'file')}",
        "written by": ", ".join(f"{name} {version}" for name, version in m.versions.items()),
        "save took": ", ".join(
            f"{name} {duration_text(m.timings[name])}"
            for name in sorted(m.timings, key=lambda phase: _PHASES.get(phase, 9))
        ),
        "generation": f"{m.generation} (the tag was overwritten)" if m.generation > 1 else "",
        "tied": listing(tied, limit),
        "left out": listing(m.excluded, limit),
        "not read": "; ".join(m.problems.values()) if isinstance(m, ForeignManifest) else "",
    }
    for name, text in rows.items():
        if text:
            yield f"{name:<12}{printable(text)}"


def _file_lines(m: Manifest, full: bool) -> list[str]:
    if isinstance(m, ForeignManifest):
        rows = [[name, size_text(r.nbytes)] for name, r in sorted(m.files.items())]
        return table(("FILE", "SIZE"), rows, right="SIZE")
    if full:
        rows = [[name, size_text(r.nbytes), r.checksum] for name, r in sorted(m.files.items())]
        return table(("FILE", "SIZE", "XXH3-128"), rows, right="SIZE")
    rows = []
    for role in ROLES:
        sizes = {_rank_of(n): r.nbytes for n, r in m.files.items() if n.startswith(f"{role}-")}
        if sizes:
            least, most = size_text(min(sizes.values())), size_text(max(sizes.values()))
            each = least if least == most else f"{least} to {most}"
            total = size_text(sum(sizes.values()))
            rows.append([role, str(len(sizes)), total, each, ranks_text(sizes)])
    return table(("ROLE", "FILES", "SIZE", "EACH", "RANKS"), rows, right="FILES SIZE")


def _state_ranks(m: Manifest) -> list[int]:
    """Ranks that stored objects. Another system's are one rank's."""
    if isinstance(m, ForeignManifest):
        return [0]
    return sorted(_rank_of(name) for name in m.files if name.startswith("state-"))


def _rank_of(name: str) -> int:
    return int(name.split("-")[1])


def _tensor_lines(m: Manifest, role: str, full: bool) -> Iterator[str]:
    tensors = m.tensors[role]
    elements = sum(prod(p.shape) for p in tensors.values())
    total = size_text(sum(p.nbytes for p in tensors.values()))
    count = plural(len(tensors), "tensor")
    yield f"{_TITLES[role]}: {count}, {count_text(elements)} elements, {total}"
    buffers, frozen = frozenset(m.buffers), frozenset(m.frozen)

    def note(key: str) -> str:
        flags = (("buffer", key in buffers), ("frozen", key in frozen))
        return ", ".join(word for word, is_set in flags if is_set and role == "model")

    def kind(key: str) -> tuple[object, ...]:
        p = tensors[key]
        return (key if full else "", p.dtype, p.shape, p.placements, note(key))

    groups = group_names(tensors, kind)
    rows = [_row(group, tensors, note(group.keys[0])) for group in groups]
    where = "FILES" if isinstance(m, ForeignManifest) else "RANKS"
    header = ("NAME", "TENSORS", "DTYPE", "SHAPE", "SIZE", "PLACEMENT", where, "")
    lines = table(header, rows, right="TENSORS SIZE")
    if not full:
        yield from lines
        return
    yield lines[0]
    for group, line in zip(groups, lines[1:], strict=True):
        yield line
        yield from _chunk_lines(tensors[group.keys[0]])


def _row(group: Group, tensors: dict[str, Placed], note: str) -> list[str]:
    first = tensors[group.keys[0]]
    ranks = {rank for key in group.keys for run in tensors[key].runs for rank in run.ranks()}
    return [
        printable(group.name),
        str(len(group.keys)),
        first.dtype,
        str(list(first.shape)),
        size_text(first.nbytes * len(group.keys)),
        ", ".join(map(placement_text, first.placements or ())) or "-",
        ranks_text(ranks),
        note,
    ]


def _chunk_lines(placed: Placed) -> Iterator[str]:
    for run in placed.runs:
        for rank, box in run:
            spans = [f"{a}:{a + n}" for a, n in zip(box.offset, box.shape, strict=True)]
            yield f"    rank {rank}: [{', '.join(spans)}]"


def _object_lines(
    storage: Storage, folder: str, m: Manifest, rank: int, full: bool, problems: list[str]
) -> Iterator[str]:
    # Loads numpy, which the other commands do without.
    from zero_ckpt.cli.objects import MAX_ITEMS, read_objects, tree_lines

    try:
        trees = read_objects(storage, folder, m, rank)
        for name, tree in trees.items():
            lines = list(tree_lines(tree.shown(), None if full else MAX_ITEMS))
            if lines:
                yield ""
                yield "OBJECTS" if name == "objects" else f"OBJECTS OF RANK {rank}"
                yield from lines
    except (CorruptShardError, OSError) as error:
        problems.append(str(error))


def _document(
    storage: Storage, folder: str, m: Manifest, full: bool, problems: list[str]
) -> dict[str, Any]:
    names = ("tag", "step", "world_size", "zero_stage", "generation", "versions", "timings")
    lists = ("buffers", "frozen", "excluded", "aliases")
    return {
        "path": folder,
        **{name: getattr(m, name) for name in names},
        "created": iso_time(m.created),
        "nbytes": m.nbytes,
        **{name: getattr(m, name) for name in lists},
        "files": {n: {"nbytes": r.nbytes, "checksum": r.checksum} for n, r in m.files.items()},
        "tensors": {
            role: {key: _tensor_record(m, role, placed, full) for key, placed in keys.items()}
            for role, keys in m.tensors.items()
        },
        **_object_records(storage, folder, m, full, problems),
        "problems": problems,
    }


def _tensor_record(m: Manifest, role: str, placed: Placed, full: bool) -> dict[str, Any]:
    record = {
        "dtype": placed.dtype,
        "shape": list(placed.shape),
        "nbytes": placed.nbytes,
        "placements": None if placed.placements is None else list(placed.placements),
        "runs": [run.to_json() for run in placed.runs],
    }
    if full:
        record["chunks"] = [
            {"file": m.file_of(role, rank), "offset": list(box.offset), "shape": list(box.shape)}
            for run in placed.runs
            for rank, box in run
        ]
    return record


def _object_records(
    storage: Storage, folder: str, m: Manifest, full: bool, problems: list[str]
) -> dict[str, Any]:
    from zero_ckpt.cli.objects import read_objects

    objects: Any = None
    by_rank: dict[str, Any] = {}
    for rank in _state_ranks(m)[: None if full else 1]:
        try:
            for name, tree in read_objects(storage, folder, m, rank).items():
                if name == "objects":
                    objects = tree.encoded()
                else:
                    by_rank[str(rank)] = tree.encoded()
        except (CorruptShardError, OSError) as error:
            problems.append(str(error))
    return {"objects": objects, "rank_objects": by_rank}
