"""Signed instructions: made, read at every split, judged, used up."""

from __future__ import annotations

import base64
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import Address, HostPort
from pyforwarder.core.first_packet.cursor import ParseError
from pyforwarder.core.first_packet.instruction import ERRORS
from pyforwarder.core.first_packet.outcome import NEED_MORE, NO_MATCH, Decision, Refuse, Route
from pyforwarder.core.reasons import CloseReason, RefusalCode
from pyforwarder.core.token import (
    MAX_LENGTH,
    SignedInstruction,
    TokenKeys,
    UsedTokens,
    key_from_file,
    make,
    read,
)
from tests.helpers.instruction import instruction
from tests.helpers.rules import ruleset

KEY = b"0123456789abcdef"
NOW = 1_800_000_000
DEST = Address("10.0.0.7", 22)
CLIENT = Address("192.0.2.7", 40000)
LINE = make(DEST, expires_unix_s=NOW + 60, key_id="ops", key=KEY)
FROM = make(
    DEST, expires_unix_s=NOW + 60, key_id="ops", key=KEY,
    source=ipaddress.ip_network("192.0.2.0/24"),
)  # fmt: skip


def parsed(line: bytes) -> SignedInstruction:
    found = read(line)
    assert isinstance(found, SignedInstruction)
    return found


def refusal(
    line: bytes, keys: TokenKeys, *, client: Address | None = CLIENT, now: float = NOW
) -> str | None:
    return keys.refusal(parsed(line), client=client, now_unix_s=now)


KEYS = TokenKeys({"ops": KEY})


def test_the_signature_is_that_of_the_specification() -> None:
    # Made with: printf %s '...' | openssl dgst -sha256 -hmac 0123456789abcdef -binary | basenc
    # --base64url, without the padding.
    assert LINE == (
        b"FWD1 10.0.0.7:22 exp=1800000060 key=ops "
        b"sig=vdrGkoH9acUxpL-hYP8tLL3D81dbd6mLEQ_wKuuBEd4\r\n"
    )


@pytest.mark.parametrize("line", [LINE, FROM])
def test_a_line_is_read_whole_and_at_every_split(line: bytes) -> None:
    assert [read(line[:n]) for n in range(len(line))] == [NEED_MORE] * len(line)
    found = parsed(line + b"payload")
    assert found == parsed(line)
    assert (found.destination, found.key_id, found.length) == (DEST, "ops", len(line))
    assert found.expires_unix_s == NOW + 60
    assert refusal(line, KEYS) is None


def test_a_signature_with_padding_is_the_same() -> None:
    assert refusal(LINE.replace(b"\r\n", b"=\r\n"), KEYS) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"10.0.0.7", b"10.0.0.8"),
        (b":22 ", b":23 "),
        (b"exp=1800000060", b"exp=1800000061"),
        (b"from=192.0.2.0/24", b"from=192.0.0.0/16"),
        (b" from=192.0.2.0/24", b""),
    ],
)
def test_what_is_signed_cannot_be_changed(old: bytes, new: bytes) -> None:
    assert old in FROM
    assert refusal(FROM.replace(old, new), KEYS) == "wrong signature"


def test_every_character_of_the_signature_counts() -> None:
    start = LINE.index(b" sig=") + 5
    for at in range(start, len(LINE) - 2):
        other = b"B" if LINE[at : at + 1] == b"A" else b"A"
        assert refusal(LINE[:at] + other + LINE[at + 1 :], KEYS) == "wrong signature"


def test_a_key_that_is_not_in_force() -> None:
    assert refusal(LINE, TokenKeys({"other": KEY})) == "unknown key 'ops'"
    assert refusal(LINE, TokenKeys({"ops": KEY[::-1]})) == "wrong signature"
    # Rotation: both are good for a while.
    assert refusal(LINE, TokenKeys({"new": KEY[::-1], "ops": KEY})) is None


@pytest.mark.parametrize(
    ("skew_s", "now", "reason"),
    [
        (0.0, NOW + 60, None),
        (0.0, NOW + 60.5, "expired"),
        (30.0, NOW + 90, None),
        (30.0, NOW + 90.5, "expired"),
        (0.0, NOW, None),
        (0.0, NOW - 40.5, "good for 100 s more, and tokens.max_lifetime is 100 s"),
        (30.0, NOW - 40.5, None),
        (30.0, NOW - 70.5, "good for 130 s more, and tokens.max_lifetime is 100 s"),
    ],
)
def test_times(skew_s: float, now: float, reason: str | None) -> None:
    keys = TokenKeys({"ops": KEY}, clock_skew_s=skew_s, max_lifetime_s=100.0)
    assert refusal(LINE, keys, now=now) == reason


@pytest.mark.parametrize(
    ("host", "good"),
    [("192.0.2.255", True), ("::ffff:192.0.2.1", True), ("192.0.3.1", False), ("::1", False)],
)
def test_the_source_is_a_network(host: str, good: bool) -> None:
    wanted = None if good else "wrong source address"
    assert refusal(FROM, KEYS, client=Address(host, 1)) == wanted
    assert refusal(FROM, KEYS, client=None) == "wrong source address"
    assert refusal(LINE, KEYS, client=None) is None


SIG = b" sig=" + b"A" * 43 + b"\r\n"


@pytest.mark.parametrize(
    "line",
    [
        b"FWD1  a:1 exp=1 key=k" + SIG,
        b"FWD1 a:1 key=k exp=1" + SIG,
        b"FWD1 a:1 exp=1 key=k to=b" + SIG,
        b"FWD1 a:1 exp=-1 key=k" + SIG,
        b"FWD1 a:1 exp=1 key=" + SIG,
        b"FWD1 a:1 exp=1 key=k from=x" + SIG,
        b"FWD1 a:1 exp=1 key=k from=192.0.2.1/24" + SIG,
        b"FWD1 a:1 exp=1 key=k from=192.0.2.0/33" + SIG,
        b"FWD1 a:0 exp=1 key=k" + SIG,
        b"FWD1 127.1:1 exp=1 key=k" + SIG,
        b"FWD1 a:1 exp=1 key=k" + SIG[:-3] + b"\r\n",
        b"FWD1 a:1 exp=1 key=k" + SIG[:-2] + b"==\r\n",
        b"FWD1 a:1 exp=1 key=k" + SIG.replace(b"A", b"+"),
        b"FWD1 a:1 exp=1 key=k sig=\r\n",
        b"FWD1 \xe4:1",
        b"FWD1 a:1\n",
        b"FWD1 a:1\rx",
        b"FWD1 " + b"a" * 507,
    ],
)
def test_what_begins_like_one_and_breaks(line: bytes) -> None:
    with pytest.raises(ParseError):
        read(line)
    with pytest.raises(ParseError):
        read(line + b"\r\n more")


def test_need_more_ends_at_the_limit() -> None:
    assert read(b"FWD1 " + b"a" * (MAX_LENGTH - 6)) is NEED_MORE
    with pytest.raises(ParseError):
        read(b"FWD1 " + b"a" * (MAX_LENGTH - 5))


@pytest.mark.parametrize("data", [b"FWD2", b"f", b"FWD1\t", b"\0"])
def test_what_is_none(data: bytes) -> None:
    assert read(data) is NO_MATCH


FOR_ONE = make(DEST, expires_unix_s=NOW + 60, key_id="ops", key=KEY, audience="gate-1")


@pytest.mark.parametrize(
    ("line", "audience", "required", "reason"),
    [
        (FOR_ONE, "gate-1", False, None),
        (FOR_ONE, "gate-1", True, None),
        (FOR_ONE, "gate-2", False, "for the gateway 'gate-1', not this one"),
        (FOR_ONE, "GATE-1", False, "for the gateway 'gate-1', not this one"),
        # A gateway without a name cannot know that it is meant.
        (FOR_ONE, None, False, "for the gateway 'gate-1', not this one"),
        (LINE, None, False, None),
        (LINE, "gate-1", False, None),
        (LINE, "gate-1", True, "names no gateway (aud=)"),
    ],
)
def test_a_token_that_names_a_gateway_is_good_at_that_one_only(
    line: bytes, audience: str | None, required: bool, reason: str | None
) -> None:
    keys = TokenKeys({"ops": KEY}, audience=audience, audience_required=required)
    assert refusal(line, keys) == reason


def test_the_gateway_is_signed_and_stands_behind_the_source() -> None:
    both = make(
        DEST, expires_unix_s=NOW + 60, key_id="ops", key=KEY,
        source=ipaddress.ip_network("192.0.2.0/24"), audience="a.B_9-",
    )  # fmt: skip
    assert both.startswith(b"FWD1 10.0.0.7:22 exp=1800000060 key=ops from=192.0.2.0/24 aud=a.B_9- ")
    assert parsed(both).audience == "a.B_9-"
    assert parsed(FROM).audience is None
    keys = TokenKeys({"ops": KEY}, audience="gate-2")
    assert refusal(FOR_ONE.replace(b"gate-1", b"gate-2"), keys) == "wrong signature"
    assert refusal(FOR_ONE.replace(b" aud=gate-1", b""), keys) == "wrong signature"
    for broken in (b" aud=", b" aud=a b", b" aud=" + b"a" * 64, b" aud=gate-1 from=192.0.2.0/24"):
        with pytest.raises(ParseError, match="the fields are not"):
            read(FOR_ONE.replace(b" aud=gate-1", broken))


@pytest.mark.parametrize("audience", ["", "a b", "\u00e4", "k" * 64, "a=b", "a\n"])
def test_a_gateway_that_cannot_be_read_is_not_written(audience: str) -> None:
    with pytest.raises(ValueError, match="no gateway's name"):
        make(DEST, expires_unix_s=NOW, key_id="k", key=KEY, audience=audience)


def test_a_nonce_makes_another_instruction_of_the_same_second_and_is_signed() -> None:
    one, two = (
        make(DEST, expires_unix_s=NOW + 60, key_id="ops", key=KEY, audience="gate-1", nonce=nonce)
        for nonce in ("a.B_9-", "b")
    )
    assert one.startswith(b"FWD1 10.0.0.7:22 exp=1800000060 key=ops aud=gate-1 nonce=a.B_9- sig=")
    keys = TokenKeys({"ops": KEY}, audience="gate-1", used=UsedTokens())
    for line in (one, two):
        assert [read(line[:n]) for n in range(len(line))] == [NEED_MORE] * len(line)
        assert refusal(line, keys) is None
    spent = [keys.spend(parsed(line), now_unix_s=NOW) for line in (one, two, one, two)]
    assert spent == [True, True, False, False]
    assert refusal(one.replace(b"nonce=a", b"nonce=b"), keys) == "wrong signature"
    assert refusal(one.replace(b" nonce=a.B_9-", b""), keys) == "wrong signature"
    for broken in (b" nonce=", b" nonce=a b", b" nonce=" + b"a" * 64, b" nonce=a nonce=b"):
        with pytest.raises(ParseError, match="the fields are not"):
            read(one.replace(b" nonce=a.B_9-", broken))


@pytest.mark.parametrize("nonce", ["", "a b", "\u00e4", "k" * 64, "a=b", "a\n"])
def test_a_nonce_that_cannot_be_read_is_not_written(nonce: str) -> None:
    with pytest.raises(ValueError, match="no nonce"):
        make(DEST, expires_unix_s=NOW, key_id="k", key=KEY, nonce=nonce)


destinations = st.one_of(
    st.builds(Address, st.ip_addresses(v=4).map(str), st.integers(1, 65535)),
    st.builds(HostPort, st.from_regex(r"[a-z]{1,20}(\.[a-z]{2,9}){0,3}", fullmatch=True),
              st.integers(1, 65535)),
)  # fmt: skip


@given(destinations, st.integers(0, 10**12 - 1), st.binary(min_size=16, max_size=80))
def test_what_is_made_is_read_and_good(
    destination: Address | HostPort, expires_unix_s: int, key: bytes
) -> None:
    line = make(destination, expires_unix_s=expires_unix_s, key_id="k.1-_", key=key)
    found = parsed(line)
    assert found.destination == destination
    keys = TokenKeys({"k.1-_": key})
    assert keys.refusal(found, client=CLIENT, now_unix_s=expires_unix_s) is None


@given(st.data())
def test_hostile_bytes_are_read_refused_or_awaited(data: st.DataObject) -> None:
    line = bytearray(FROM)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(line)))
        line[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    settled: object = None
    for length in range(len(line) + 1):
        try:
            answer: object = read(bytes(line[:length]))
        except ParseError:
            answer = "broken"
        assert settled in (None, answer)
        if answer is not NEED_MORE:
            settled = answer


@pytest.mark.parametrize("key_id", ["", "a b", "ä", "k" * 64, "a=b"])
def test_a_key_id_that_cannot_be_read_is_not_written(key_id: str) -> None:
    with pytest.raises(ValueError, match="no key id"):
        make(DEST, expires_unix_s=NOW, key_id=key_id, key=KEY)


def test_a_time_that_cannot_be_read_is_not_written() -> None:
    for expires_unix_s in (-1, 10**12):
        with pytest.raises(ValueError, match="no time"):
            make(DEST, expires_unix_s=expires_unix_s, key_id="k", key=KEY)


def test_a_key_file() -> None:
    assert key_from_file(KEY + b"\n") == KEY
    assert key_from_file(KEY + b"\n\n") == KEY + b"\n"
    assert key_from_file(bytes(16)) == bytes(16)
    with pytest.raises(ValueError, match="at least 16 bytes, this one has 15"):
        key_from_file(KEY[1:] + b"\n")


def test_used_tokens_are_forgotten_when_they_expire() -> None:
    used = UsedTokens(capacity=3)
    for number in range(3):
        assert used.spend(b"%d" % number, expires_unix_s=10 + number, now_unix_s=5)
    assert not used.spend(b"0", expires_unix_s=10, now_unix_s=10)
    assert not used.spend(b"new", expires_unix_s=20, now_unix_s=10)
    assert used.spend(b"new", expires_unix_s=20, now_unix_s=10.5)
    assert len(used) == 3


# In a rule.


def decide(data: bytes, use: str, *, keys: TokenKeys = KEYS, now: float | None = NOW) -> Decision:
    rules = ruleset({"match": "instruction", "allow": ["any"], "token": use}, keys=keys)
    assert rules.needs_clock == (use != "off")
    return rules.decide(data, client=CLIENT, local_port=1, now_unix_s=now)


def is_refused(decision: Decision) -> bool:
    refused = isinstance(decision, Refuse) and decision.reason is CloseReason.TOKEN
    assert not refused or decision.reply == ERRORS[RefusalCode.TOKEN]  # type: ignore[union-attr]
    return refused


def test_a_rule_takes_one_form_the_other_or_both() -> None:
    unsigned = instruction("10.0.0.7:22")
    assert isinstance(decide(unsigned, "off"), Route)
    assert isinstance(decide(unsigned, "optional"), Route)
    assert is_refused(decide(unsigned, "required"))
    for use in ("optional", "required"):
        decision = decide(LINE + b"x", use)
        assert isinstance(decision, Route)
        assert (decision.to, decision.skip) == (DEST, len(LINE))
    off = decide(LINE, "off")
    assert isinstance(off, Refuse)
    assert off.reason is CloseReason.NO_MATCH


def test_a_token_that_is_not_good_is_refused() -> None:
    assert is_refused(decide(LINE, "required", now=NOW + 61))
    assert is_refused(decide(LINE, "required", keys=TokenKeys({})))
    # Without a clock nothing is known to be in force.
    assert is_refused(decide(LINE, "required", now=None))
    broken = decide(LINE.replace(b"exp=", b"exq="), "required")
    assert isinstance(broken, Refuse)
    assert broken.reply == ERRORS[RefusalCode.MALFORMED]


def test_a_single_use_token_is_used_up_only_by_a_good_one() -> None:
    keys = TokenKeys({"ops": KEY}, used=UsedTokens())
    assert is_refused(decide(LINE, "required", keys=keys, now=NOW + 61))
    assert isinstance(decide(LINE, "required", keys=keys), Route)
    assert is_refused(decide(LINE, "required", keys=keys))


def test_the_signature_is_base64url_of_32_bytes() -> None:
    signature = LINE.partition(b" sig=")[2].strip()
    assert len(base64.urlsafe_b64decode(signature + b"=")) == 32
