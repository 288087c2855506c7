"""`zero-ckpt repair PATH`: rebuilds lost manifests from shard files, and puts aside what cannot be saved."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from zero_ckpt.cli.text import json_text, printable
from zero_ckpt.core.finding import list_tags, no_checkpoint, without_advice
from zero_ckpt.core.foreign import ForeignManifest
from zero_ckpt.core.latest import move_latest
from zero_ckpt.core.manifest import MANIFEST_NAME
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.core.recovery import quarantine, rebuild
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.tag_folder import DAMAGED_NAME, holds_shards, read_tag
from zero_ckpt.core.tags import LATEST_NAME, read_latest
from zero_ckpt.core.verification import Verifier, cause_unread
from zero_ckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, ZeroCkptError

SUMMARY = "rebuild lost manifests, put aside what cannot be saved"
DESCRIPTION = """\
Rebuilds a lost or damaged manifest.json from shard files that are whole. Every byte is read; what is not all of one
save, bit for bit, is refused. For a checkpoint directory: every tag in it, and then 'latest', if it names none that
is whole. Changes nothing else. Data that is damaged cannot be repaired: with --quarantine its manifest is renamed, so
that no load tries it any more. A file that cannot be read or written, for want of permission for example, is no
damage: that tag has 'failed', 'latest' stays as it is, and the exit status is 2. Run it when no job saves there."""
EXAMPLES = """\
  zero-ckpt repair checkpoints/global_step100
  zero-ckpt repair checkpoints --quarantine"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one tag: `whole`, `rebuilt`, `quarantined`, `damaged`, or `failed` (not read, not written)."""

    tag: str
    kind: str
    detail: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a tag's folder, or a checkpoint directory")
    parser.add_argument(
        "--quarantine",
        action="store_true",
        help=f"rename the manifest of what cannot be repaired to {DAMAGED_NAME}",
    )


def run(options: argparse.Namespace) -> int:
    storage, path = AnyStorage(), absolute(options.path)
    directory, tags, is_directory = _choose(storage, path)
    outcomes = [_repair(storage, directory, tag, options.quarantine) for tag in tags]
    latest = _repair_latest(storage, directory, outcomes) if is_directory else ""
    if options.json:
        records = [{"tag": o.tag, "outcome": o.kind, "detail": o.detail} for o in outcomes]
        print(json_text({"directory": directory, "tags": records, "latest": latest or None}))
    else:
        for outcome in outcomes:
            shown = os.path.join(options.path, outcome.tag) if is_directory else options.path
            detail = f": {outcome.detail}" if outcome.detail else ""
            print(printable(f"{shown}: {outcome.kind}{detail}"))
        if latest:
            shown = os.path.join(options.path, LATEST_NAME)
            print(printable(f"{shown}: names '{latest}' now"))
    kinds = {outcome.kind for outcome in outcomes}
    return 2 if "failed" in kinds else int("damaged" in kinds)


def _choose(storage: Storage, path: str) -> tuple[str, list[str], bool]:
    """(checkpoint directory, tags in it, whether the directory itself was meant)."""
    try:
        names = [entry.name for entry in storage.list(path) if not entry.is_dir]
    except OSError:
        names = []  # `list_tags` says why
    if MANIFEST_NAME in names or holds_shards(names):
        directory, _, tag = path.rpartition("/")
        return directory, [tag], False
    tags = [info.name for info in list_tags(storage, path)]
    if not tags:
        raise no_checkpoint(storage, path)
    return path, tags, True


def _repair(storage: Storage, directory: str, tag: str, may_quarantine: bool) -> Outcome:
    try:
        return _repair_reachable(storage, f"{directory}/{tag}", tag, may_quarantine)
    except OSError as error:
        where = f"{os.path.basename(error.filename)}: " if error.filename else ""
        return Outcome(tag, "failed", f"{where}{error.strerror or error}")


def _repair_reachable(storage: Storage, folder: str, tag: str, may_quarantine: bool) -> Outcome:
    """Raises `OSError` when the folder cannot be listed, or the manifest not written."""
    problem, is_unread = _problem(storage, folder)
    if not problem:
        return Outcome(tag, "whole")
    if is_unread:
        return Outcome(tag, "failed", problem)
    names = [entry.name for entry in storage.list(folder) if not entry.is_dir]
    has_manifest = MANIFEST_NAME in names
    try:
        manifest = rebuild(storage, folder)
    except CorruptCheckpointError as error:
        why = without_advice(str(error).removeprefix(f"{folder}: "))
        detail = f"{without_advice(problem)}; {why}"
        if cause_unread(error) is not None:
            return Outcome(tag, "failed", detail)
        if has_manifest and may_quarantine:
            quarantine(storage, folder)
        elif has_manifest or DAMAGED_NAME not in names:
            return Outcome(tag, "damaged", detail)
        return Outcome(tag, "quarantined", detail)
    if has_manifest:
        quarantine(storage, folder)
    storage.put(f"{folder}/{MANIFEST_NAME}", manifest.to_bytes())
    return Outcome(tag, "rebuilt", f"step {manifest.step}, {len(manifest.files)} files")


def _problem(storage: Storage, folder: str) -> tuple[str, bool]:
    """Why the checkpoint in `folder` is not whole, and whether something could not be read, which may be whole.

    "" when it is whole, and for another system's.
    """
    try:
        manifest = read_tag(storage, folder)
    except CheckpointNotFoundError:
        return f"no {MANIFEST_NAME}", False
    except CorruptCheckpointError as error:
        return str(error).removeprefix(f"{folder}/"), cause_unread(error) is not None
    if isinstance(manifest, ForeignManifest):
        return "", False
    with Verifier(storage) as verifier:
        return "; ".join(verifier.damage(folder, manifest)), verifier.unread is not None


def _repair_latest(storage: Storage, directory: str, outcomes: list[Outcome]) -> str:
    """Let `latest` name the newest whole checkpoint, if what it names is none. Returns that tag, or "".

    It stays while a tag is out of reach, which may be the one that it names.
    """
    if any(outcome.kind == "failed" for outcome in outcomes):
        return ""
    whole = {outcome.tag for outcome in outcomes if outcome.kind in ("whole", "rebuilt")}
    newest = [info.name for info in list_tags(storage, directory) if info.name in whole]
    if not newest or read_latest(storage, directory) in whole:
        return ""
    try:
        move_latest(storage, directory, newest[-1])
    except OSError as error:
        raise ZeroCkptError(f"{directory}/{LATEST_NAME}: {error.strerror or error}") from error
    return newest[-1]
