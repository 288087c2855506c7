from __future__ import annotations

import io
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zero_ckpt.cli.groups import group_names
from zero_ckpt.cli.progress import Progress
from zero_ckpt.cli.text import (
    age_text,
    count_text,
    duration_text,
    iso_time,
    listing,
    printable,
    ranks_text,
    size_text,
    table,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0031, "3 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.10 s"),
        (9.99, "9.99 s"),
        (9.999, "10.0 s"),
        (99.9, "99.9 s"),
        (310.4, "310 s"),
    ],
)
def test_durations_have_two_or_three_digits(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (12_000_000_000, "12.0 GB"),
        (3 * 10**15, "3.0 PB"),
    ],
)
def test_sizes_are_decimal(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_counts_have_no_unit() -> None:
    assert [count_text(n) for n in (7, 12_345, 250_100_000)] == ["7", "12.3 k", "250.1 M"]


@pytest.mark.parametrize(
    ("age", "text"),
    [
        (0, "just now"),
        (-3, "just now"),
        (59, "59 s ago"),
        (61, "1 min ago"),
        (2 * 3600 + 5, "2 h ago"),
        (3 * 86400, "3 d ago"),
        (400 * 86400, "2022-10-10"),
        (-7200, "2023-11-15"),
    ],
)
def test_ages_are_relative_until_they_are_long(
    age: float, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    now = 1_700_000_000.0
    assert age_text(now - age, now) == text


def test_times_no_calendar_has_are_shown_all_the_same() -> None:
    assert iso_time(1_700_000_000.25) == "2023-11-14T22:13:20.250Z"
    assert iso_time(1e300).startswith("1970")
    assert iso_time(float("nan")).startswith("1970")
    assert age_text(1e300)


@settings(deadline=None)
@given(st.text())
def test_printable_text_is_one_harmless_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([0], "0"),
        (range(8), "0-7"),
        ([0, 2, 5], "0,2,5"),
        ([3, 2, 8, 9], "2-3,8-9"),
        (range(0, 20, 2), "10 of 0-18"),
    ],
)
def test_ranks_are_short(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text


def test_long_lists_say_how_much_is_left_out() -> None:
    assert listing(["a", "b"], 2) == "a, b"
    assert listing(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listing(["a", "b", "c"], None) == "a, b, c"


def test_columns_are_aligned() -> None:
    lines = table(("NAME", "SIZE"), [["a", "1 B"], ["long name", "10 B"]], right="SIZE")
    assert lines == ["NAME       SIZE", "a           1 B", "long name  10 B"]


def _names(keys: list[str]) -> list[str]:
    return [group.name for group in group_names(keys, lambda key: None)]


def test_groups_name_exactly_the_keys_they_stand_for() -> None:
    assert _names(["layers.0.w", "layers.1.w", "layers.2.w"]) == ["layers.{0..2}.w"]
    assert _names(["layers.0.w", "layers.4.w"]) == ["layers.{0,4}.w"]
    assert _names(["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"]) == ["l.{0..1}.e.{0..1}"]
    assert _names(["l.0.e.0", "l.1.e.1"]) == ["l.*.e.*"]
    assert _names(["w1", "w2", "0.weight", "1.weight/exp_avg"]) == [
        "w1",
        "w2",
        "0.weight",
        "1.weight/exp_avg",
    ]
    assert _names(["a.01", "a.1"]) == ["a.01", "a.1"]
    assert _names(["7", "8"]) == ["{7..8}"]


def test_states_of_the_same_parameters_are_one_group() -> None:
    keys = [f"{i}.weight/{state}" for i in range(2) for state in ("step", "exp_avg", "exp_avg_sq")]
    groups = group_names(keys, lambda key: key.endswith("step"))
    assert [(group.name, len(group.keys)) for group in groups] == [
        ("{0..1}.weight/step", 2),
        ("{0..1}.weight/{exp_avg,exp_avg_sq}", 4),
    ]
    assert _names(["a/x", "b/x"]) == ["a/x", "b/x"]
    assert _names(["a", "a/b", "b", "/a"]) == ["a", "a/b", "b", "/a"]


def test_keys_of_different_kinds_stay_apart() -> None:
    keys = ["l.0.w", "l.1.w", "l.2.w"]
    groups = group_names(keys, lambda key: key == "l.1.w")
    assert [(group.name, group.keys) for group in groups] == [
        ("l.{0,2}.w", ("l.0.w", "l.2.w")),
        ("l.1.w", ("l.1.w",)),
    ]


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[a-c0-9./]{1,8}", fullmatch=True), unique=True))
def test_every_key_is_in_one_group(keys: list[str]) -> None:
    groups = group_names(keys, lambda key: None)
    assert sorted(key for group in groups for key in group.keys) == sorted(keys)
    assert all(group.name == group.keys[0] for group in groups if len(group.keys) == 1)
    exact = [group.name for group in groups if "*" not in group.name]
    assert len(set(exact)) == len(exact)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_and_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zero_ckpt.cli.progress.INTERVAL", 0.0)
    stream = _Terminal()
    with Progress("verifying", 2_000_000, stream) as progress:
        progress.add(500_000)
        progress.set(1_000_000, 4_000_000)
    drawn = stream.getvalue().split("\r")
    assert drawn[1].startswith("verifying  [######                  ]  25%  500.0 kB of 2.0 MB")
    assert "25%  1.0 MB of 4.0 MB" in drawn[2]
    assert drawn[-1] == "\x1b[K"


def test_progress_is_silent_elsewhere() -> None:
    stream = io.StringIO()
    with Progress("verifying", 10, stream) as progress:
        progress.add(10)
    assert stream.getvalue() == ""


def test_progress_of_nothing_is_no_error() -> None:
    assert "0%" in Progress("exporting", 0, _Terminal()).line(0.0)
