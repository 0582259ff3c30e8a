"""The instruction, unsigned: every length, every check, every split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.first_packet import instruction
from pyforwarder.core.first_packet.instruction import ERRORS, OK, frame
from pyforwarder.core.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    NO_MATCH,
    Answer,
    End,
    Refuse,
    Route,
)
from pyforwarder.core.reasons import CloseReason, RefusalCode
from tests.helpers.first_packets import decided_after, said
from tests.helpers.rules import ruleset

RULE = {"match": "instruction", "allow": ["loopback"]}
LENIENT = ruleset(RULE)
STRICT = ruleset({**RULE, "checksum": "required"})
SILENT = ruleset({**RULE, "ack": False})
EXAMPLE = b"18127.0.0.1:900102"


def decide(data: bytes, *, strict: bool = False, end: End = End.OPEN) -> Answer:
    return (STRICT if strict else LENIENT).decide(data, client=None, local_port=0, end=end)


def is_malformed(answer: Answer) -> bool:
    return isinstance(answer, Refuse) and answer.reason is CloseReason.MALFORMED


def destination(answer: Answer) -> str:
    assert isinstance(answer, Route), answer
    return str(answer.to)


def test_the_examples_of_the_protocol() -> None:
    assert OK == b"06OK56"
    assert ERRORS[RefusalCode.DENIED] == b"14ERR denied83"
    answer = decide(EXAMPLE + b"payload")
    assert destination(answer) == "127.0.0.1:9001"
    assert isinstance(answer, Route)
    assert (answer.skip, answer.named_by_client) == (18, True)
    assert answer.negotiation is not None
    assert answer.negotiation.granted(None) == OK
    assert answer.negotiation.refused(RefusalCode.BUSY) == frame(b"ERR busy")


@pytest.mark.parametrize(
    "text",
    ["1.2.3.4:5", "[::1]:80", "[2001:db8::1]:65535", "a.example:443", "localhost:1", "a:1"],
)
def test_every_form_of_destination_at_every_split(text: str) -> None:
    data = frame(text.encode())
    for strict in (False, True):
        assert [decide(data[:n], strict=strict) for n in range(len(data))] == [NEED_MORE] * len(
            data
        )
        assert destination(decide(data, strict=strict)) == text
        assert destination(decide(data + b"99", strict=strict)) == text
    unchecked = data[:-2] + b"00"
    assert destination(decide(unchecked)) == text
    assert is_malformed(decide(unchecked, strict=True)) == (data != unchecked)


def test_a_check_that_comes_out_as_00_is_right_when_required() -> None:
    texts = (f"10.0.0.1:{port}" for port in range(1, 65536))
    text = next(text for text in texts if frame(text.encode()).endswith(b"00"))
    assert destination(decide(frame(text.encode()), strict=True)) == text


@pytest.mark.parametrize("check", [n for n in range(100) if n not in (0, 2)])
def test_every_wrong_check_is_malformed(check: int) -> None:
    assert is_malformed(decide(EXAMPLE[:-2] + b"%02d" % check))


@pytest.mark.parametrize("length", range(100))
def test_lengths_from_6_begin_an_instruction(length: int) -> None:
    outcome = said("instruction", b"%02d" % length)
    assert outcome is (NEED_MORE if length >= 6 else NO_MATCH)


@pytest.mark.parametrize("data", [b"G", b"1x", b"x1", b" 18", b"-1", b"\0\0", b"\xb2\xb2", b"F"])
def test_what_begins_otherwise_is_no_match(data: bytes) -> None:
    assert decided_after("instruction", data)[0] is NO_MATCH


BROKEN = [
    b"1812 ", b"18\0", b"18127.0.0.1:9001 2", b"18127.0.0.1:90010x", b"99\xff", b"06OK56",
    b"08127.00", b"18127.0.0.1;900102",
]  # fmt: skip


@pytest.mark.parametrize("data", BROKEN)
def test_what_begins_like_one_and_breaks_is_malformed(data: bytes) -> None:
    answer = decide(data)
    assert is_malformed(answer)
    assert isinstance(answer, Refuse)
    assert answer.reply == ERRORS[RefusalCode.MALFORMED]
    assert not answer.reset
    assert decided_after("instruction", data)[0] is MATCH


@pytest.mark.parametrize("text", ["127.1:80", "1.2.3.4", ":80", "a:0", "a:65536", "::1:80", "a:+1"])
def test_a_destination_that_is_none_is_malformed(text: str) -> None:
    assert is_malformed(decide(frame(text.encode())))


@pytest.mark.parametrize(
    ("end", "reason", "reply"),
    [
        (End.TIMEOUT, CloseReason.TIMEOUT, ERRORS[RefusalCode.TIMEOUT]),
        (End.FULL, CloseReason.MALFORMED, ERRORS[RefusalCode.MALFORMED]),
        (End.EOF, CloseReason.MALFORMED, ERRORS[RefusalCode.MALFORMED]),
    ],
)
def test_half_an_instruction_is_answered_at_its_end(
    end: End, reason: CloseReason, reply: bytes
) -> None:
    answer = decide(EXAMPLE[:9], end=end)
    assert isinstance(answer, Refuse)
    assert (answer.reason, answer.reply, answer.reset) == (reason, reply, False)


def test_without_ack_nothing_is_ever_said() -> None:
    answer = SILENT.decide(EXAMPLE, client=None, local_port=0)
    assert isinstance(answer, Route)
    assert answer.negotiation is None
    for data, end in ((b"18\0", End.OPEN), (EXAMPLE[:9], End.TIMEOUT)):
        answer = SILENT.decide(data, client=None, local_port=0, end=end)
        assert isinstance(answer, Refuse)
        assert answer.reply == b""


def test_with_a_destination_of_its_own_a_rule_only_recognises() -> None:
    rules = ruleset({"match": "instruction", "to": "127.0.0.1:1"})
    answer = rules.decide(EXAMPLE, client=None, local_port=0)
    assert isinstance(answer, Route)
    assert (str(answer.to), answer.skip, answer.negotiation) == ("127.0.0.1:1", 0, None)


@given(st.binary(max_size=110))
def test_any_content_that_fits_can_be_framed_and_read_back(content: bytes) -> None:
    if 2 <= len(content) <= 95:
        data = frame(content)
        assert len(data) == len(content) + 4
        assert int(data[:2]) == len(data)
        assert int(data[-2:]) == sum(data[:-2]) % 100
    else:
        with pytest.raises(ValueError, match="cannot be written"):
            frame(content)


@given(
    st.one_of(st.binary(max_size=120), st.from_regex(rb"[0-9]{2}[a-z0-9.:]{0,97}", fullmatch=True))
)
def test_decisions_on_hostile_bytes_are_final(data: bytes) -> None:
    for strict in (False, True):
        answers = [decide(data[:n], strict=strict) for n in range(len(data) + 1)]
        after = next((n for n, answer in enumerate(answers) if answer is not NEED_MORE), len(data))
        assert all(answer == answers[after] for answer in answers[after:])
        if len(data) >= instruction.MAX_LENGTH:
            assert answers[-1] is not NEED_MORE
