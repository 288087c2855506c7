"""The commit record: it says back all that it was told, and believes nothing that was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.strategies import layouts
from zero_ckpt.core.layout import ROLES, Layout, Table
from zero_ckpt.core.manifest import FileRecord, Manifest, Summary, shard_name
from zero_ckpt.core.planner import plan_save
from zero_ckpt.errors import CorruptManifestError, FormatVersionError

RANKS = 8
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def files_of(world_size: int, generation: int = 1) -> dict[str, FileRecord]:
    keys = [
        shard_name(role, r, world_size, generation) for role in ROLES for r in range(world_size)
    ]
    return {key: FileRecord(8192 + i, f"{i:032x}") for i, key in enumerate(keys)}


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    table = Table()
    for role in ROLES:
        some = draw(st.dictionaries(names, layouts(), max_size=3))
        plain = draw(st.dictionaries(names, st.just(Layout("BF16", (3, 2))), max_size=2))
        table.roles[role] = some | plain
    roles = plan_save([(table, range(RANKS))]).roles
    generation = draw(st.integers(1, 3))
    stored = sorted(roles["model"])
    lists = st.lists(names, max_size=3)
    return Manifest(
        tag=draw(names),
        step=draw(st.integers(0, 2**63)),
        world_size=RANKS,
        zero_stage=draw(st.integers(0, 3)),
        generation=generation,
        created=draw(st.floats(0, 1e10)),
        files=files_of(RANKS, generation),
        tensors=roles,
        buffers=draw(lists),
        frozen=draw(lists),
        excluded=draw(lists),
        aliases=draw(st.dictionaries(names, st.sampled_from(stored), max_size=2)) if stored else {},
        versions=draw(st.dictionaries(names, names, max_size=2)),
        timings=draw(st.dictionaries(names, st.floats(0, 1e6), max_size=2)),
    )


@settings(max_examples=40)
@given(manifests())
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert again.to_bytes() == data
    assert [list(keys) for keys in again.tensors.values()] == [
        list(keys) for keys in manifest.tensors.values()
    ]


@settings(max_examples=40)
@given(manifests())
def test_a_summary_says_what_the_manifest_says(manifest: Manifest) -> None:
    """Whatever the order of the fields."""
    data = manifest.to_bytes()
    body = json.loads(data.split(b"\n", 1)[1].removesuffix(b"\n}\n"))
    turned = sealed(json.dumps(dict(reversed(body.items()))))
    for found in (Summary.from_bytes(data), Summary.from_bytes(turned)):
        assert found.nbytes == manifest.nbytes
        for name in Summary.__dataclass_fields__:
            assert getattr(found, name) == getattr(manifest, name)


def test_a_damaged_manifest_has_no_summary() -> None:
    data = small().to_bytes()
    with pytest.raises(CorruptManifestError, match="checksum"):
        Summary.from_bytes(data.replace(b'"placements"', b'"placement5"'))


def small() -> Manifest:
    table = Table()
    table.roles["model"] = {"w": Layout("F32", (4, 2)), "b": Layout("F32", (2,))}
    return Manifest(
        tag="global_step7",
        step=7,
        world_size=2,
        zero_stage=2,
        created=1.5,
        files=files_of(2),
        tensors=plan_save([(table, range(2))]).roles,
        aliases={"tied": "w"},
        versions={"torch": "2"},
        timings={"write": 0.25},
    )


GOOD = small().to_bytes()


def test_every_flipped_bit_is_found() -> None:
    for at in range(len(GOOD)):
        for bit in range(8):
            bad = bytearray(GOOD)
            bad[at] ^= 1 << bit
            with pytest.raises((CorruptManifestError, FormatVersionError)):
                Manifest.from_bytes(bytes(bad))


def test_every_truncation_and_any_more_bytes_are_found() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(CorruptManifestError):
            Manifest.from_bytes(GOOD[:length])
    for more in (b"\n", b" ", b"}", GOOD):
        with pytest.raises(CorruptManifestError):
            Manifest.from_bytes(GOOD + more)


@given(st.binary(max_size=200))
def test_bytes_of_something_else_are_no_manifest(data: bytes) -> None:
    with pytest.raises(CorruptManifestError, match=r"somewhere: not a zero_ckpt manifest"):
        Manifest.from_bytes(data, "somewhere")


def test_a_newer_format_is_named() -> None:
    with pytest.raises(FormatVersionError, match=r"here: format version 2; .* Upgrade"):
        Manifest.from_bytes(GOOD.replace(b'"zero_ckpt": 1', b'"zero_ckpt": 2', 1), "here")


def sealed(body: str) -> bytes:
    """Any body under a checksum that holds: what someone who lies would write."""
    checksum = xxhash.xxh3_128_hexdigest(body.encode())
    head = f'{{"zero_ckpt": 1, "checksum": "{checksum}", "manifest":\n'
    return head.encode() + body.encode() + b"\n}\n"


def good_body() -> dict[str, Any]:
    body = json.loads(GOOD)["manifest"]
    assert isinstance(body, dict)
    return body


def set_at(*path: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(body: dict[str, Any], value: Any) -> None:
        target: Any = body
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = value

    return change


HUGE = 10**400
FILE = "model-00000-of-00002.safetensors"
RUN = ("layouts", 0, "runs", 0)
LIES: list[tuple[Callable[[dict[str, Any], Any], None], Any]] = [
    *(
        (set_at(name), value)
        for name in ("step", "world_size", "zero_stage", "generation")
        for value in (-1, 1.0, True, None, "1")
    ),
    (set_at("world_size"), 10**18),
    (set_at("world_size"), 0),
    (set_at("generation"), 2),
    (set_at("tag"), 5),
    (set_at("created"), HUGE),
    (set_at("created"), None),
    (set_at("timings"), {"write": HUGE}),
    (set_at("timings"), []),
    (set_at("versions"), {"torch": 2}),
    (set_at("buffers"), "w"),
    (set_at("frozen"), [1]),
    (set_at("aliases"), {"tied": "gone"}),
    (set_at("aliases"), {"tied": ["w"]}),
    (set_at("files"), {}),
    (set_at("files", "../../etc/passwd"), [1, "0" * 32]),
    (set_at("files", "model-00000-of-00002.safetensors\n"), [1, "0" * 32]),
    (set_at("files", FILE), [0, "0" * 32]),
    (set_at("files", FILE), [8192.0, "0" * 32]),
    (set_at("files", FILE), [8192, "0"]),
    (set_at("files", FILE), [8192]),
    (set_at("layouts"), {}),
    (set_at("layouts", 0, "dtype"), "F31"),
    (set_at("layouts", 0, "dtype"), ["F32"]),
    (set_at("layouts", 0, "shape"), [4]),
    (set_at("layouts", 0, "shape"), [4, -2]),
    (set_at("layouts", 0, "shape"), [4, 3]),
    (set_at("layouts", 0, "shape"), [HUGE] * 1000),
    (set_at("layouts", 0, "placements"), "R"),
    (set_at("layouts", 0, "runs"), []),
    (set_at("layouts", 0, "runs"), [{"rank": 0, "offset": [0, 0], "shape": [4, 2]}] * 2),
    (set_at(*RUN, "rank"), 2),
    (set_at(*RUN, "shape"), [2, 2]),
    (set_at("tensors"), {"model": {}}),
    (set_at("tensors", "model", "w"), 9),
    (set_at("tensors", "model", "w"), -1),
    (set_at("tensors", "model", "w"), True),
    (set_at("tensors", "model"), []),
]


@pytest.mark.parametrize("case", range(len(LIES)))
def test_a_manifest_that_lies_is_refused(case: int) -> None:
    change, value = LIES[case]
    body = good_body()
    change(body, value)
    with pytest.raises(CorruptManifestError, match="the checksum holds, but the content"):
        Manifest.from_bytes(sealed(json.dumps(body)))


def test_a_long_run_cannot_make_the_reader_fill_the_memory() -> None:
    """10^12 chunks on as many ranks: refused because so many ranks would have more files than are listed."""
    count = 10**12
    body = good_body()
    run = {"rank": 0, "offset": [0, 0], "shape": [1, 2], "count": count, "stride": 1, "dim": 0}
    for step in (1, 2):
        body["world_size"] = count
        body["layouts"][0]["shape"] = [count * step, 2]
        body["layouts"][0]["runs"] = [run | {"step": step, "last": 1}]
        with pytest.raises(CorruptManifestError):
            Manifest.from_bytes(sealed(json.dumps(body)))


@pytest.mark.parametrize(
    "body",
    ["", "[]", "null", "{}", "[" * 100_000, '{"a":' * 100_000, "9" * 10_000, '"\\ud800"', "NaN"],
    ids=lambda body: body[:4],
)
def test_a_body_that_is_no_manifest_is_refused(body: str) -> None:
    with pytest.raises(CorruptManifestError):
        Manifest.from_bytes(sealed(body))


def test_a_missing_field_is_refused() -> None:
    for name in good_body():
        body = good_body()
        del body[name]
        with pytest.raises(CorruptManifestError):
            Manifest.from_bytes(sealed(json.dumps(body)))
