"""`zero-ckpt ls DIR`: the checkpoints of a directory, oldest first."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from zero_ckpt.cli.text import age_text, iso_time, json_text, printable, size_text, table
from zero_ckpt.core.finding import NOT_COMMITTED, TagInfo, list_tags, no_checkpoint
from zero_ckpt.core.places import AnyStorage, absolute, is_url
from zero_ckpt.core.storage import Entry, Storage
from zero_ckpt.core.tag_folder import DAMAGED_NAME, check_files, is_tag_folder, summarize_tag
from zero_ckpt.core.tags import read_latest
from zero_ckpt.errors import CheckpointNotFoundError, CorruptCheckpointError

SUMMARY = "list the checkpoints of a directory"
DESCRIPTION = """\
Lists every tag of a checkpoint directory: those without a readable manifest, then the others, oldest first. Reads
manifests and file lengths, no data: 'verify' does that. A tag that is 'not committed' is a save that crashed or still
runs; it is never loaded, nor is one that 'repair' has 'quarantined'. In the JSON, of 'verify', too, a tag is
'committed' when it has a manifest, also a damaged one: what is wrong with it is its 'problem'."""
EXAMPLES = """\
  zero-ckpt ls checkpoints
  zero-ckpt ls checkpoints --json | jq -r '.tags[] | select(.committed and .problem == null) | .tag'"""


@dataclass(slots=True)
class Row:
    """One tag. `links`: names of symbolic links in the directory that lead to it."""

    info: TagInfo
    nbytes: int
    problem: str
    is_latest: bool
    links: list[str] = field(default_factory=list)
    is_quarantined: bool = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", help="checkpoint directory")


def run(options: argparse.Namespace) -> int:
    directory = absolute(options.path)
    storage = AnyStorage()
    if is_tag_folder(storage, directory):
        raise CheckpointNotFoundError(
            f"{options.path}: one checkpoint, not a directory of them: use 'zero-ckpt inspect {options.path}', "
            f"or 'zero-ckpt ls {os.path.dirname(directory)}'"
        )
    rows: list[Row] = []
    while not rows:
        infos = list_tags(storage, directory)
        if not infos:
            raise no_checkpoint(storage, directory)
        latest, links = read_latest(storage, directory), _links(directory)
        for info in infos:
            with suppress(FileNotFoundError):  # the retention of a running job has removed it
                rows.append(_row(storage, directory, info, latest, links))
    if options.json:
        tags = [_record(directory, row) for row in rows]
        print(json_text({"directory": directory, "latest": latest, "tags": tags}))
        return 0
    print("\n".join(_table(rows)))
    notes = [f"{row.info.name}: {row.problem}" for row in rows if _is_damaged(row)]
    is_listed = latest is None or any(row.is_latest for row in rows)
    if not (is_listed or is_tag_folder(storage, f"{directory}/{latest}")):  # else it is newer
        notes.append(f"latest: names {latest!r}, which is not here")
    print("".join(f"\n{printable(note)}" for note in notes), end="\n" if notes else "")
    return 0


def _row(
    storage: Storage,
    directory: str,
    info: TagInfo,
    latest: str | None,
    links: dict[str, list[str]],
) -> Row:
    """Raises `FileNotFoundError` for a tag that has been removed meanwhile."""
    folder = f"{directory}/{info.name}"
    problem, is_quarantined = info.problem.removeprefix(f"{folder}/"), False
    if info.summary is None:
        entries = _entries(storage, folder)
        nbytes = sum(e.nbytes for e in entries if e.name.endswith(".safetensors"))
        is_quarantined = problem == NOT_COMMITTED and DAMAGED_NAME in {e.name for e in entries}
    else:
        nbytes = info.summary.nbytes
        try:
            check_files(storage, folder, info.summary)
        except CorruptCheckpointError as error:
            again = summarize_tag(storage, folder)
            if again != info.summary:  # overwritten meanwhile
                return _row(storage, directory, TagInfo(info.name, again), latest, links)
            problem = str(error).removeprefix(f"{folder}/")
    is_latest = info.name == latest
    return Row(info, nbytes, problem, is_latest, links.get(info.name, []), is_quarantined)


def _entries(storage: Storage, folder: str) -> list[Entry]:
    """What is in a folder; nothing where it cannot be listed. Raises `FileNotFoundError`."""
    try:
        return storage.list(folder)
    except FileNotFoundError:
        raise
    except OSError:  # the tag's problem says so
        return []


def _links(directory: str) -> dict[str, list[str]]:
    """tag -> symbolic links beside it that lead to it, such as `last.ckpt`."""
    found: dict[str, list[str]] = {}
    if is_url(directory):
        return found
    real = os.path.realpath(directory)
    with os.scandir(directory) as entries:
        for entry in entries:
            target = os.path.realpath(entry.path) if entry.is_symlink() else ""
            if os.path.dirname(target) == real:
                found.setdefault(os.path.basename(target), []).append(entry.name)
    return found


def _table(rows: list[Row]) -> list[str]:
    header = ("TAG", "STEP", "SIZE", "SAVED", "STAGE x RANKS", "STATUS")
    return table(header, [_cells(row) for row in rows], right="STEP SIZE")


def _cells(row: Row) -> list[str]:
    m = row.info.summary
    step, saved, ranks = "-", "-", "-"
    if m is not None:
        step, saved, ranks = str(m.step), age_text(m.created), f"{m.zero_stage} x {m.world_size}"
    return [printable(row.info.name), step, size_text(row.nbytes), saved, ranks, _status(row)]


def _status(row: Row) -> str:
    words = ["damaged" if _is_damaged(row) else row.problem or "committed"]
    words += ["quarantined"] if row.is_quarantined else []
    words += ["latest"] if row.is_latest else []
    words += [f"linked as {printable(name)}" for name in sorted(row.links)]
    return ", ".join(words)


def _is_damaged(row: Row) -> bool:
    return bool(row.problem) and row.problem != NOT_COMMITTED


def _record(directory: str, row: Row) -> dict[str, Any]:
    m = row.info.summary
    return {
        "tag": row.info.name,
        "path": f"{directory}/{row.info.name}",
        "committed": row.info.problem != NOT_COMMITTED,
        "latest": row.is_latest,
        "step": m and m.step,
        "nbytes": row.nbytes,
        "created": m and iso_time(m.created),
        "zero_stage": m and m.zero_stage,
        "world_size": m and m.world_size,
        "generation": m and m.generation,
        "links": sorted(row.links),
        "problem": row.problem or None,
        "quarantined": row.is_quarantined,
    }
