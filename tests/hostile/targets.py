"""Every place where bytes that anybody may have written are parsed: each target takes any bytes, and raises only when
an error is not a documented one, or something was believed that cannot be.

Checksums are made right here, so that what they protect is reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import xxhash

from zero_ckpt.core.decoding import decode_objects, show_objects
from zero_ckpt.core.dtypes import itemsize
from zero_ckpt.core.finding import Candidates, locate
from zero_ckpt.core.manifest import FileRecord, Manifest, Summary
from zero_ckpt.core.memory import round_up
from zero_ckpt.core.runs import runs_coverage_error
from zero_ckpt.core.shard_reader import open_shard
from zero_ckpt.errors import CorruptManifestError, ZeroCkptError
from zero_ckpt.interop.deepspeed.pickle_reader import load_pickle
from zero_ckpt.interop.deepspeed.plain import CONSTRUCTORS
from zero_ckpt.interop.deepspeed.records import PickleError
from zero_ckpt.testing import RecordingStorage

__all__ = ["TARGETS"]


def manifest(body: bytes) -> None:
    """The content of a manifest whose checksum holds."""
    checksum = xxhash.xxh3_128_hexdigest(body).encode()
    data = b'{"zero_ckpt": 1, "checksum": "%s", "manifest":\n%s\n}\n' % (checksum, body)
    for parse in (Summary.from_bytes, Manifest.from_bytes):
        try:
            found: Any = parse(data, "/run/tag/manifest.json")
        except CorruptManifestError:
            continue
        assert all("/" not in name and ".." not in name for name in found.files)
        if isinstance(found, Manifest):
            for keys in found.tensors.values():
                for placed in keys.values():
                    runs_coverage_error(placed.shape, placed.runs)


def whole_manifest(data: bytes) -> None:
    """The file itself, with whatever checksum and version it names."""
    for parse in (Summary.from_bytes, Manifest.from_bytes):
        try:
            parse(data, "/run/tag/manifest.json")
        except ZeroCkptError:
            continue


def header(text: bytes) -> None:
    """A shard file's header, before as much data as it tells of and a block table that is right."""
    padded = round_up(8 + len(text)) - 8
    head = padded.to_bytes(8, "little") + text.ljust(padded)
    body = bytes(_told_bytes(text))
    table = xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") if body else b""
    data = head + body + table
    record = FileRecord(len(data), xxhash.xxh3_128_hexdigest(head + table))
    storage = RecordingStorage({"/run/file": data})
    try:
        reader = open_shard(storage, "/run/file", record)
    except ZeroCkptError:
        return
    for chunk in reader.chunks:
        assert 0 <= chunk.begin <= chunk.end <= len(body)
        assert chunk.end - chunk.begin == chunk.box.numel * itemsize(chunk.dtype)


def _told_bytes(text: bytes) -> int:
    try:
        told = json.loads(text)["__zero_ckpt_blocks__"]["data_offsets"][0]
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0
    return told if type(told) is int and 0 <= told <= 1 << 16 else 0


def objects(data: bytes) -> None:
    """An object tree, with small tensors and raw bytes for whatever entry it names."""

    def entry(name: str) -> torch.Tensor:
        return torch.zeros(3)

    for decode in (
        lambda: decode_objects(data, entry, dtensor=entry, blob=lambda _: b"never opened"),
        lambda: show_objects(data, lambda name: f"entry {name!r}"),
    ):
        try:
            decode()
        except ZeroCkptError:
            continue


def latest(data: bytes) -> None:
    """The file `latest`, in a directory with one checkpoint's folder and a file beside the directory."""
    storage = RecordingStorage(
        {"/run/latest": data, "/run/tag/manifest.json": b"{}", "/other/manifest.json": b"{}"}
    )
    directory, named = locate(storage, "/run", None)
    assert (directory, named) == ("/run", None)
    try:
        found = Candidates(storage, directory).next()
    except ZeroCkptError:
        return
    raise AssertionError(f"{found} was found where nothing is")


def pickled(data: bytes) -> None:
    """A pickle as DeepSpeed's files hold: values and inert records, or a refusal."""

    def storage(_: Any) -> Any:
        raise PickleError("no storages here")

    try:
        load_pickle(data, CONSTRUCTORS, storage)
    except (PickleError, ZeroCkptError):
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "whole_manifest": whole_manifest,
    "header": header,
    "objects": objects,
    "latest": latest,
    "pickle": pickled,
}
