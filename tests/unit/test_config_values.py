"""Single values: durations, sizes, names, switches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.config import values
from pyforwarder.core.address import Address, HostPort, UnixAddress


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("250ms", 0.25),
        ("5s", 5.0),
        ("1h", 3600.0),
        ("5m", 300.0),
        ("2d", 172_800.0),
        ("1.5s", 1.5),
        ("1h30m", 5400.0),
        ("1m500ms", 60.5),
        (0, 0.0),
        ("0s", 0.0),
    ],
)
def test_a_duration_is_seconds(written: object, seconds: float) -> None:
    assert values.parse_duration(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "written",
    [
        5,
        "5",
        "",
        "s",
        "5 s",
        "-5s",
        "5S",
        "5sec",
        "1h 30m",
        "1e3s",
        ".5s",
        "5.s",
        True,
        False,
        None,
        [],
        "9999999d",
        "1s\n",
        "\u0665s",
    ],
)
def test_what_is_no_duration_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"duration|year"):
        values.parse_duration(written)


@pytest.mark.parametrize("written", [5, "5"])
def test_a_duration_without_unit_is_answered_with_one(written: object) -> None:
    with pytest.raises(ValueError, match=r"did you mean 5s\?"):
        values.parse_duration(written)


@given(st.integers(0, 10**6), st.sampled_from(["ms", "s", "m"]))
def test_durations_keep_their_unit(number: int, unit: str) -> None:
    factor = {"ms": 0.001, "s": 1, "m": 60}[unit]
    if number * factor <= values.MAX_DURATION_S:
        assert values.parse_duration(f"{number}{unit}") == pytest.approx(number * factor)


@pytest.mark.parametrize(
    ("written", "size"),
    [("16KiB", 16_384), ("1MiB", 1_048_576), ("2GiB", 2 << 30), ("10B", 10), (0, 0), (4096, 4096)],
)
def test_a_size_is_bytes(written: object, size: int) -> None:
    assert values.parse_size(written) == size


@pytest.mark.parametrize(
    "written",
    ["16", "16kb", "16K", "1 MiB", "-1KiB", -1, 1.5, True, None, "1.5MiB", "2000GiB", 1 << 41],
)
def test_what_is_no_size_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"size|range"):
        values.parse_size(written)


@pytest.mark.parametrize(
    ("written", "meant"), [("16kb", "16KiB"), ("1 MB", "1MiB"), ("2G", "2GiB")]
)
def test_a_size_in_another_spelling_is_answered_with_ours(written: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?"):
        values.parse_size(written)


@pytest.mark.parametrize("name", ["a", "tls-2", "x" * 63, "web.1", "a:b", "!"])
def test_a_name_is_printable(name: str) -> None:
    assert values.parse_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-", "a b", "a\n", "x" * 64, "\u00fc", "\x7f", 5, True, None, []]
)
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="name"):
        values.parse_name(name)


@pytest.mark.parametrize(
    ("written", "to"),
    [
        ("127.0.0.1:22", Address("127.0.0.1", 22)),
        ("[::1]:25", Address("::1", 25)),
        ("host:22", HostPort("host", 22)),
        ("unix:/run/a", UnixAddress("/run/a")),
        ("web", "web"),
    ],
)
def test_to_is_an_address_or_an_upstreams_name(written: str, to: object) -> None:
    assert values.parse_to(written) == to


@pytest.mark.parametrize("written", ["127.0.0.1:", "a b", "", 22, ["::1"], None])
def test_what_is_no_to_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"port|name|text"):
        values.parse_to(written)


def test_an_unquoted_ipv6_address_is_answered_with_quotes() -> None:
    with pytest.raises(ValueError, match="needs quotes"):
        values.parse_to(["::1"])


@pytest.mark.parametrize(
    ("word", "value"), [("on", True), ("off", False), ("Yes", True), ("NO", False)]
)
def test_a_switch_has_yamls_words(word: str, value: bool) -> None:
    assert values.parse_switch(word) is value
    assert values.parse_switch(value) is value


@pytest.mark.parametrize("word", ["maybe", 1, 0, None, "true ", ""])
def test_a_switch_has_no_other_words(word: object) -> None:
    with pytest.raises(ValueError, match="neither"):
        values.parse_switch(word)


def test_a_file_is_an_absolute_path() -> None:
    assert str(values.parse_file("/etc/key")) == "/etc/key"
    with pytest.raises(ValueError, match="absolute"):
        values.parse_file("etc/key")


def test_a_suggestion_is_the_closest_word_or_all_of_them() -> None:
    assert values.suggestion("listner", ["listeners", "limits"]) == "did you mean 'listeners'?"
    assert values.suggestion("zzz", ["b", "a"]) == "known: a, b"
    assert values.suggestion("zzz", []) == ""
