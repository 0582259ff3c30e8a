"""YAML as plain values with lines, from hostile texts, too."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.config.document import MAX_BYTES, MAX_DEPTH, Node, read_document
from pyforwarder.errors import ConfigError


def read(text: str) -> Node:
    return read_document(text, source="a.yaml")


def refuse(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.source == "a.yaml"
    return caught.value


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n"])
def test_an_empty_text_has_no_values(text: str) -> None:
    assert read(text).plain() in ({}, None)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("0", 0),
        ("-1", -1),
        ("10000", 10_000),
        ("0016", "0016"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1.2", "1.2"),
        ("1e3", "1e3"),
        ("12:30:00", "12:30:00"),
        ("2001-01-01", "2001-01-01"),
        ("9" * 30, "9" * 30),
        ("127.0.0.1:9999", "127.0.0.1:9999"),
        ("250ms", "250ms"),
        ('"5"', "5"),
        ('"off"', "off"),
        ("'true'", "true"),
        ("!!str 5", "5"),
        ("! 5", "5"),
        ("|\n  5\n", "5\n"),
    ],
)
def test_plain_scalars_are_what_they_look_like(written: str, value: object) -> None:
    read_back = read(f"key: {written}").plain()
    assert read_back == {"key": value}
    assert isinstance(read_back, dict)
    assert type(read_back["key"]) is type(value)


def test_every_value_knows_its_line_and_path() -> None:
    node = read("a: 1\nb:\n  - c: 2\n\n    d:\n      - x\n      - y\n")
    assert node.locate(["a"]) == ("a", 1)
    assert node.locate(["b"]) == ("b", 2)
    assert node.locate(["b", 0, "c"]) == ("b[0].c", 3)
    assert node.locate(["b", 0, "d", 1]) == ("b[0].d[1]", 7)


def test_a_missing_key_stands_where_its_mapping_begins() -> None:
    node = read("a: 1\nb:\n  - c: 2\n")
    assert node.locate(["b", 0, "e"]) == ("b[0].e", 3)


def test_parts_of_a_path_that_are_a_validators_own_are_left_out() -> None:
    node = read("b:\n  - c: 2\n")
    assert node.locate(["b", "tuple", 0, "c", "int"]) == ("b[0].c", 2)
    assert node.locate(["b", 7, 0, "c"]) == ("b[0].c", 2)


def test_a_key_may_stand_once() -> None:
    error = refuse("a: 1\nb:\n  - x: 1\n    y: 2\n    x: 3\n")
    assert (error.line, error.path) == (5, "b[0].x")
    assert error.reason == "'x' stands here a second time, first in line 3"


def test_keys_are_compared_as_they_are_written() -> None:
    assert read("1: a\n'01': b\n").plain() == {"1": "a", "01": "b"}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: [1\nb: 2\n", 2, "not YAML"),
        ("a: 1\n\tb: 2\n", 2, "not YAML"),
        ("a: 'x\n", 2, "not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: *b\n", 1, "names nothing before it; text that begins with * needs quotes"),
        ("a: *\n", 1, 'write "*" in quotes'),
        ("a: {b: *}\n", 1, 'write "*" in quotes'),
        ("a: 1\nb: [x, *.example.com, y]\n", 2, 'write "*.example.com" in quotes'),
        ("a:\n- *.example.com\n", 2, 'write "*.example.com" in quotes'),
        ("a: &b [*b]\n", 1, "names nothing"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "tags"),
        ("a: !!timestamp 2001-01-01\n", 1, "tags"),
        ("a: !mine x\n", 1, "tags"),
        ("a: 1\n? [b, c]\n: 2\n", 2, "a key must be a word"),
        ("? {b: c}\n: 2\n", 1, "a key must be a word"),
        ("a: &x b\n*x : 2\n", 2, "a key must be a word"),
    ],
)
def test_what_is_no_plain_document_is_refused_with_its_line(
    text: str, line: int, reason: str
) -> None:
    error = refuse(text)
    assert error.line == line
    assert reason in str(error)


def test_control_characters_are_refused() -> None:
    assert "not YAML" in str(refuse("a: \x00"))
    assert "not YAML" in str(refuse("a: \x1b[31m"))


def test_an_alias_stands_for_what_it_names() -> None:
    assert read("a: &x [1, 2]\nb: *x\nc: &y z\nd: *y\n").plain() == {
        "a": [1, 2],
        "b": [1, 2],
        "c": "z",
        "d": "z",
    }


def test_aliases_that_multiply_are_refused_before_they_are_expanded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    error = refuse("\n".join(lines))
    assert "more than 200000 values" in error.reason
    assert error.line == 6


def test_aliases_that_deepen_are_refused() -> None:
    lines = ["a0: &a0 x"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60)]
    error = refuse("\n".join(lines))
    assert f"more than {MAX_DEPTH} deep" in error.reason


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_depth_is_bounded(opening: str) -> None:
    refuse(opening * 5000)


def test_the_deepest_allowed_document_is_read() -> None:
    depth = MAX_DEPTH
    node = read("[" * depth + "]" * depth)
    for _ in range(depth - 1):
        assert node.items is not None
        (node,) = node.items
    assert node.items == []
    assert "deep" in refuse("[" * (depth + 1) + "]" * (depth + 1)).reason


def test_size_is_bounded_in_bytes() -> None:
    assert "larger than 1 MiB" in refuse("#" * (MAX_BYTES + 1)).reason
    assert "larger than 1 MiB" in refuse("#" + "\u00fc" * (MAX_BYTES // 2)).reason
    assert read("#" * MAX_BYTES).plain() == {}


def test_a_flat_flood_of_values_is_bounded() -> None:
    assert "values" in refuse("[" + "a," * 250_000 + "]").reason


@given(st.text(max_size=200))
def test_any_text_is_a_document_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        read(text).plain()


_ATOMS = st.sampled_from(
    [
        "a: ",
        "b: ",
        "- ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&x ",
        "*x",
        "!!str ",
        "'",
        '"',
        "#",
        "|",
        "? ",
        ": ",
        "1",
    ]
)


@given(st.lists(_ATOMS, max_size=30).map("".join))
def test_any_yaml_like_text_is_a_document_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        read(text).plain()


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(min_size=1, max_size=5), _PLAIN, max_size=5))
def test_what_a_yaml_writer_writes_is_read_back(value: dict[str, object]) -> None:
    text = yaml.safe_dump(value, allow_unicode=False)
    assert read(text).plain() == value
