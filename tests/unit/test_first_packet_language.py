"""What matches are made of: cursor, names with stars, regular expressions, and, or, not."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import Address
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.glob import Globs
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, End, Outcome
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.first_packets import decided_after, matcher, said

# The cursor: too few bytes and wrong bytes are different things.


def test_bytes_that_have_not_come_are_truncated() -> None:
    cursor = Cursor(b"\1\2\3")
    assert cursor.get_uint16() == 0x0102
    for read in (cursor.get_uint16, cursor.get_uint24, cursor.get_uint32):
        with pytest.raises(Truncated):
            read()
    assert (cursor.position, cursor.remaining, cursor.get_uint8()) == (2, 1, 3)
    with pytest.raises(Truncated):
        cursor.get_uint8()


def test_numbers_are_in_network_order() -> None:
    assert Cursor(b"\1\2\3\4").get_uint24() == 0x010203
    assert Cursor(b"\1\2\3\4").get_uint32() == 0x01020304


def test_a_length_beyond_its_block_is_wrong_even_before_its_bytes_come() -> None:
    cursor = Cursor(b"\1\2")
    with pytest.raises(ParseError), cursor.restrict_to(3):
        cursor.skip(4)
    cursor = Cursor(b"\1\2")
    with pytest.raises(ParseError), cursor.restrict_to(3), cursor.restrict_to(4):
        pass
    with pytest.raises(ParseError):
        Cursor(b"\1\2\3", 0, 2).get_uint24()


def test_a_block_is_read_to_its_end() -> None:
    cursor = Cursor(b"\1\2\3")
    with pytest.raises(ParseError), cursor.restrict_to(2):
        cursor.get_uint8()
    # The outer block is in force again.
    assert cursor.remaining == 2


def test_text_up_to_a_stop() -> None:
    cursor = Cursor(b"ab\0cd")
    assert cursor.get_until(b"\0", at_most=2) == b"ab"
    with pytest.raises(Truncated):
        cursor.get_until(b"\0", at_most=2)
    with pytest.raises(ParseError):
        cursor.get_until(b"\0", at_most=1)
    with pytest.raises(ParseError):
        Cursor(b"abc", 0, 2).get_until(b"c", at_most=9)


# Names with stars.


@pytest.mark.parametrize(
    ("pattern", "fits", "fails"),
    [
        ("a.example", ["a.example", "A.EXAMPLE"], ["a.example.", "xa.example", ""]),
        ("*.example", ["a.example", ".example", "a.b.example"], ["example", "a.example.org"]),
        ("a*", ["a", "ab"], ["ba", ""]),
        ("*", ["", "x"], []),
        ("a*b*c", ["abc", "axbxbc", "abbc"], ["acb", "ab", "abcd"]),
        ("ab*ba", ["abba", "abxba"], ["aba"]),
        ("*ab*ab*", ["abab", "xabxabx"], ["ab", "aba"]),
    ],
)
def test_a_name_with_stars(pattern: str, fits: list[str], fails: list[str]) -> None:
    globs = Globs([pattern], ignore_case=True)
    assert [text for text in fits + fails if globs.include(text)] == fits


@given(st.text("ab*", max_size=7), st.text("ab", max_size=9))
def test_a_name_with_stars_is_that_regular_expression(pattern: str, text: str) -> None:
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    wanted = re.fullmatch(expression, text) is not None
    assert Globs([pattern], ignore_case=False).include(text) == wanted


def test_case_counts_where_it_should() -> None:
    assert not Globs(["/V1"], ignore_case=False).include("/v1")


# Regular expressions: the answer and when it comes, against every text over two letters.

PATTERNS = [
    "^a", "^ab", "^(a|bb)a", "^a*b", "^a+b", "^a?b", "^(?:ab){2}", "^a{2}", "^a{1,3}b", "^a{2,}b",
    "^[ab]b", "^[^a]b", "^(ab|a)b", "^(a|ab)(b|ab)", "^(?i:AB)", "(?i)^AB", "^(?:a|^b)b",
    "^(?:a*b){2}a", r"^\x61b", r"^a.b", "^(?:)ab", "^a{0}b", "^(?:^a)b", "^(a|aa)*b",
]  # fmt: skip
LONGEST = 6
TEXTS = [
    "".join(letters).encode()
    for length in range(LONGEST + 1)
    for letters in itertools.product("ab", repeat=length)
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_anchored_pattern_says_no_as_soon_as_nothing_can_match(pattern: str) -> None:
    flags = re.IGNORECASE if "(?i)" in pattern else 0
    oracle = re.compile(pattern.replace("(?i)", "").encode(), flags)
    regex = matcher({"regex": pattern})
    matching = {text for text in TEXTS if oracle.match(text)}
    # Half as long as the longest, so that what may still come is among the texts.
    for text in TEXTS:
        if len(text) > LONGEST // 2 - 1:
            continue
        if text in matching:
            wanted = MATCH
        elif any(longer.startswith(text) for longer in matching):
            wanted = NEED_MORE
        else:
            wanted = NO_MATCH
        assert said(regex, text) is wanted, text


@pytest.mark.parametrize("pattern", PATTERNS)
@given(st.lists(st.sampled_from([b"a", b"b", b"A", b"\0", b"\n", b"\xff"]), max_size=12))
def test_a_pattern_never_changes_its_mind(pattern: str, letters: list[bytes]) -> None:
    assert isinstance(decided_after({"regex": pattern}, b"".join(letters))[0], Outcome)


def test_without_an_anchor_a_pattern_may_match_anywhere_later() -> None:
    assert decided_after({"regex": "b+c"}, b"a" * 500 + b"bbc") == (MATCH, 503)
    assert said({"regex": "b"}, b"a" * 1000) is NEED_MORE
    assert said({"regex": ["^b", "^c"]}, b"a") is NO_MATCH
    assert said({"regex": ["^b", "c"]}, b"a") is NEED_MORE


def test_a_hostile_pattern_does_not_stall() -> None:
    # Python's own `re` takes longer than the universe for this.
    regex = matcher({"regex": "^(?:a|a)*(?:a*)*b"})
    started_s = time.process_time()
    assert said(regex, b"a" * 16_000) is NEED_MORE
    assert said(regex, b"a" * 16_000 + b"c") is NO_MATCH
    assert time.process_time() - started_s < scaled_s(1.0)


@pytest.mark.parametrize(
    "pattern",
    # Each of them has too many states for RE2's fast way, on text of a and b.
    ["[ab]*a[ab]{900}c", "(?:[ab]*a[ab]{90}c){3}", "(.*a.{30}){9}x", "^[ab]*a[ab]{200}c"],
)
def test_a_pattern_that_is_slow_is_not_very_slow(pattern: str) -> None:
    regex = matcher({"regex": pattern})
    chance = random.Random(23)
    text = bytes(chance.choice(b"ab") for _ in range(16384)) * 64
    started_s = time.thread_time()
    for size in (16383, 16384, 1 << 20):
        # Beyond 16 KiB it is known that nothing more comes for a regular expression.
        assert said(regex, text[:size]) is (NEED_MORE if size < 16384 else NO_MATCH)
    assert time.thread_time() - started_s < 2.0


def test_an_answer_of_a_pattern_stays_beyond_what_it_looks_at() -> None:
    for size in (16383, 16384, 16385, 40_000):
        assert said({"regex": "b"}, b"b" + b"a" * size) is MATCH
        assert said({"regex": "b"}, b"a" * size + b"b") is (MATCH if size < 16384 else NO_MATCH)


# And, or, not.

NETS = {"client": ["192.0.2.0/24", "2001:db8::/32"]}
HERE = Address("192.0.2.7", 1)
ELSEWHERE = Address("198.51.100.7", 1)


@pytest.mark.parametrize(
    ("match", "data", "outcome"),
    [
        ({"all": ["ssh", {"bytes": "SSH-2"}]}, b"SSH-", NEED_MORE),
        ({"all": ["ssh", {"bytes": "SSH-2"}]}, b"SSH-2", MATCH),
        ({"all": ["ssh", {"bytes": "SSH-2"}]}, b"SSH-1", NO_MATCH),
        ({"all": [{"bytes": {"prefix": "x", "offset": 9}}, "ssh"]}, b"x", NO_MATCH),
        ({"any_of": ["ssh", "tls"]}, b"SSH-", MATCH),
        (["ssh", "tls"], b"\x16\x03", NEED_MORE),
        (["ssh", "tls"], b"x", NO_MATCH),
        ({"not": "ssh"}, b"SSH", NEED_MORE),
        ({"not": "ssh"}, b"SSH-", NO_MATCH),
        ({"not": "ssh"}, b"x", MATCH),
        ({"ssh": None, "not": {"bytes": "SSH-1"}}, b"SSH-2", MATCH),
        ({"ssh": None, "not": {"bytes": "SSH-1"}}, b"SSH-1", NO_MATCH),
    ],
)
def test_conditions_combine(match: object, data: bytes, outcome: Outcome) -> None:
    assert said(match, data) is outcome


def test_where_the_connection_comes_from_and_goes_to() -> None:
    both = matcher({"ssh": None, **NETS, "port": [22, "2200-2299"]})
    assert both.match(b"", End.OPEN, HERE, 22) is NEED_MORE
    assert both.match(b"SSH-", End.OPEN, HERE, 2299) is MATCH
    # Known before the first byte.
    assert both.match(b"", End.OPEN, ELSEWHERE, 22) is NO_MATCH
    assert both.match(b"", End.OPEN, None, 22) is NO_MATCH
    assert both.match(b"", End.OPEN, HERE, 2300) is NO_MATCH
    assert both.match(b"SSH-", End.OPEN, Address("::ffff:192.0.2.9", 1), 22) is MATCH
    assert both.match(b"SSH-", End.OPEN, Address("2001:db8::9", 1), 22) is MATCH


VALUES = [NO_MATCH, NEED_MORE, MATCH]
SAYING: dict[Outcome, object] = {
    NO_MATCH: {"bytes": "x"},
    NEED_MORE: {"bytes": "ab"},
    MATCH: {"bytes": "a"},
}


@pytest.mark.parametrize(("one", "other"), [*itertools.product(VALUES, VALUES)])
def test_and_is_the_least_or_the_greatest_of_three(one: Outcome, other: Outcome) -> None:
    parts = [SAYING[one], SAYING[other]]
    ranks = [VALUES.index(one), VALUES.index(other)]
    assert said({"all": parts}, b"a") is VALUES[min(ranks)]
    assert said({"any_of": parts}, b"a") is VALUES[max(ranks)]
    assert said({"not": parts[0]}, b"a") is VALUES[2 - ranks[0]]
