"""Around the body of a manifest: the format's version, and a checksum by which a flipped bit is found. Pure.

One JSON object, whose first line has the version and the XXH3-128 of the body's bytes:

    {"zero_ckpt": 1, "checksum": "<32 hex digits>", "manifest":
    {...body...}
    }

Knows nothing of what the body says.
"""

from __future__ import annotations

import re

import xxhash

from zero_ckpt.errors import CorruptManifestError, FormatVersionError

__all__ = ["FORMAT_VERSION", "MANIFEST_REMEDY", "seal", "unseal"]

FORMAT_VERSION = 1

_HEAD = re.compile(rb'\{"zero_ckpt": (\d{1,9}), "checksum": "([0-9a-f]{32})", "manifest":\n')
_TAIL = b"\n}\n"
MANIFEST_REMEDY = (
    "Use an earlier tag, or let 'zero-ckpt repair' rebuild it from shard files that are whole."
)


def seal(body: bytes) -> bytes:
    """`body`, a JSON value, in its envelope."""
    checksum = xxhash.xxh3_128_hexdigest(body)
    head = f'{{"zero_ckpt": {FORMAT_VERSION}, "checksum": "{checksum}", "manifest":\n'
    return head.encode() + body + _TAIL


def unseal(data: bytes, path: str) -> bytes:
    """The body, as it was sealed. Raises `CorruptManifestError` or `FormatVersionError`, naming `path`."""
    match = _HEAD.match(data)
    if match is None:
        raise CorruptManifestError(
            f"{path}: not a zero_ckpt manifest, or damaged: {len(data)} bytes found, starting {data[:24]!r}. "
            f"{MANIFEST_REMEDY}"
        )
    version = int(match[1])
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format version {version}; this zero_ckpt reads up to version {FORMAT_VERSION}. Upgrade zero-ckpt."
        )
    body = data[match.end() : -len(_TAIL)]
    expected, found = match[2].decode(), xxhash.xxh3_128_hexdigest(body)
    if not data.endswith(_TAIL) or found != expected or version < 1:
        raise CorruptManifestError(
            f"{path}: checksum {expected} expected, {found} found over {len(body)} bytes: "
            f"the manifest is truncated or damaged. {MANIFEST_REMEDY}"
        )
    return body
