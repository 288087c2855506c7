"""`zero-ckpt verify PATH`: every byte of one checkpoint, or of every tag of a directory."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_ckpt.cli.progress import Progress
from zero_ckpt.cli.text import duration_text, json_text, plural, printable, size_text
from zero_ckpt.core.finding import NOT_COMMITTED, TagInfo, list_tags, locate, no_checkpoint
from zero_ckpt.core.manifest import Manifest
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import read_tag
from zero_ckpt.core.tags import LATEST_NAME, read_latest
from zero_ckpt.core.verification import Verifier
from zero_ckpt.errors import CheckpointNotFoundError, CorruptManifestError

SUMMARY = "read every byte and report all damage"
DESCRIPTION = """\
Reads every byte of a checkpoint and compares it with the checksums of the save. Damage gives one line each and exit
status 1; it never stops the rest. A checkpoint directory is verified tag by tag; 'not committed' is no damage."""
EXAMPLES = """\
  zero-ckpt verify checkpoints
  zero-ckpt verify checkpoints/global_step100
  zero-ckpt verify checkpoints || zero-ckpt ls checkpoints"""

REMOVED = "removed meanwhile"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What to verify: tags of a directory. `faults`: what is wrong with its `latest`. `shown`: tag -> path to print."""

    directory: str
    infos: Sequence[TagInfo]
    shown: Mapping[str, str]
    faults: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in one tag's folder. `damage`: one line each, starting with a file's name."""

    info: TagInfo
    damage: Sequence[str]

    @property
    def is_committed(self) -> bool:
        return self.info.problem not in (NOT_COMMITTED, REMOVED)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a tag's folder, or a checkpoint directory")


def run(options: argparse.Namespace) -> int:
    storage, begin = AnyStorage(), time.monotonic()
    chosen = _choose(storage, options.path)
    total = sum(info.summary.nbytes for info in chosen.infos if info.summary)
    reports = []
    with Progress("verifying", total) as progress, Verifier(storage, progress.add) as verifier:
        for info in chosen.infos:
            report = _verify(storage, verifier, chosen.directory, info)
            reports.append(report)
            if not options.json:
                progress.clear()
                print("\n".join(_lines(chosen.shown[info.name], report)), flush=True)
    if options.json:
        print(json_text(_document(chosen, reports)))
    else:
        print("".join(f"{printable(fault)}\n" for fault in chosen.faults), end="")
        seconds = time.monotonic() - begin
        print(_summary(reports, chosen.faults, verifier.bytes_read, seconds))
    return int(bool(chosen.faults) or any(report.damage for report in reports))


def _choose(storage: Storage, path: str) -> Chosen:
    directory, tag = locate(storage, absolute(path), None)
    if tag is not None:
        return Chosen(directory, [_read_tag(storage, directory, tag)], {tag: path})
    infos = list_tags(storage, directory)
    if all(info.problem == NOT_COMMITTED for info in infos):
        raise no_checkpoint(storage, directory, [])
    shown = {info.name: os.path.join(path, info.name) for info in infos}
    return Chosen(directory, infos, shown, _latest_faults(storage, directory, infos))


def _latest_faults(storage: Storage, directory: str, infos: Sequence[TagInfo]) -> list[str]:
    if not any(entry.name == LATEST_NAME for entry in storage.list(directory)):
        return []
    tag = read_latest(storage, directory)
    if tag is None:
        return [f"{LATEST_NAME}: a tag's name expected, none found"]
    if any(info.name == tag and info.problem != NOT_COMMITTED for info in infos):
        return []
    if _read_tag(storage, directory, tag).summary is not None:  # newer than the list
        return []
    return [f"{LATEST_NAME}: names {tag!r}, which is no committed checkpoint here"]


def _verify(storage: Storage, verifier: Verifier, directory: str, info: TagInfo) -> Report:
    folder = f"{directory}/{info.name}"
    if info.summary is not None:
        info = _read_tag(storage, directory, info.name)
    while isinstance(info.summary, Manifest):
        damage = list(verifier.damage(folder, info.summary))
        again = _read_tag(storage, directory, info.name) if damage else info
        if again == info:
            return Report(info, damage)
        info = again  # a running job has overwritten or removed the tag meanwhile
    if info.problem in (NOT_COMMITTED, REMOVED):
        return Report(info, [])
    return Report(info, [info.problem.removeprefix(f"{folder}/")])


def _read_tag(storage: Storage, directory: str, tag: str) -> TagInfo:
    try:
        return TagInfo(tag, read_tag(storage, f"{directory}/{tag}"))
    except CheckpointNotFoundError:
        return TagInfo(tag, None, REMOVED)
    except CorruptManifestError as error:
        return TagInfo(tag, None, str(error))


def _lines(shown: str, report: Report) -> list[str]:
    summary = report.info.summary
    if report.damage:
        return [printable(os.path.join(shown, line)) for line in report.damage]
    if summary is None:
        return [printable(f"{shown}: {report.info.problem}, skipped")]
    text = f"{shown}: ok, {plural(len(summary.files), 'file')}, {size_text(summary.nbytes)}"
    return [printable(text)]


def _summary(reports: Sequence[Report], faults: Sequence[str], nbytes: int, seconds: float) -> str:
    speed = f"{size_text(nbytes)} in {duration_text(seconds)}"
    speed += f", {size_text(nbytes / seconds)}/s" if seconds > 1 else ""
    bad = sum(bool(report.damage) for report in reports)
    if not bad and not faults:
        return f"no damage ({speed})"
    lines = sum(len(report.damage) for report in reports) + len(faults)
    committed = plural(sum(report.is_committed for report in reports), "checkpoint")
    places = [f"{bad} of {committed}"] if bad else []
    places += [f"'{LATEST_NAME}'"] if faults else []
    return f"DAMAGE: {plural(lines, 'line')} above, in {' and '.join(places)} ({speed})"


def _document(chosen: Chosen, reports: Sequence[Report]) -> dict[str, Any]:
    return {
        "directory": chosen.directory,
        "ok": not chosen.faults and not any(report.damage for report in reports),
        "latest_damage": list(chosen.faults),
        "checkpoints": [_record(chosen.directory, report) for report in reports],
    }


def _record(directory: str, report: Report) -> dict[str, Any]:
    summary = report.info.summary
    return {
        "tag": report.info.name,
        "path": f"{directory}/{report.info.name}",
        "committed": report.is_committed,
        "ok": summary is not None and not report.damage,
        "files": len(summary.files) if summary else 0,
        "nbytes": summary.nbytes if summary else 0,
        "damage": list(report.damage),
    }
