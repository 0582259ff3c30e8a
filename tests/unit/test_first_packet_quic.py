"""`quic`: what a client's first datagrams say, however they are cut, strewn and ordered."""

from __future__ import annotations

import json
import random
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.first_packet import quic_initial
from pyforwarder.core.first_packet.cursor import ParseError
from pyforwarder.core.first_packet.datagrams import Datagrams
from pyforwarder.core.first_packet.options import OptionError
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, End, Outcome
from pyforwarder.core.first_packet.quic import read_client_hello
from pyforwarder.core.first_packet.table import Terms, build
from tests.helpers.fuzzing import Stopwatch
from tests.helpers.quic import (
    DCID,
    HANDSHAKE,
    PADDING,
    PING,
    RETRY,
    V1,
    V2,
    aioquic_client,
    crypto,
    extension,
    header,
    hello,
    initial,
    scrambled,
    split_hello,
    varint,
    zero_rtt,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyforwarder.core.first_packet.matcher import Matcher

VECTORS = {
    name: bytes.fromhex("".join(lines))
    for name, lines in json.loads(
        (Path(__file__).parent.parent / "data" / "quic_initials.json").read_text()
    ).items()
}
NAMED = {"quic": {"sni": ["*.example.com"]}}
VERSIONS = pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])


def quic(match: object = NAMED) -> Matcher:
    return build(match, Terms(datagrams=True))


def said(datagrams: Sequence[bytes], match: object = NAMED) -> Outcome:
    return quic(match).match(Datagrams(datagrams), End.OPEN, None, 0)


def name_in(datagrams: Sequence[bytes]) -> str | None:
    read = read_client_hello(tuple(datagrams))
    return read.server_name if read is not None else None


# What the RFCs and other implementations send.


@pytest.mark.parametrize(("name", "version"), [("RFC 9001 A.2", "1"), ("RFC 9369 A.2", "2")])
def test_packets_of_the_rfcs_are_read(name: str, version: str) -> None:
    matcher = quic({"quic": {"sni": "example.com"}})
    data = VECTORS[name]
    assert matcher.match(data, End.FULL, None, 0) is MATCH
    assert matcher.facts(data) == (("sni", "example.com"),)
    assert matcher.describe(data) == f"server name example.com, alpn alpn, version {version}"


@pytest.mark.parametrize("versions", [(V1,), (V2,), (V2, V1)])
def test_client_of_aioquic_is_read(versions: tuple[int, ...]) -> None:
    datagrams = aioquic_client("shop.example.com", versions=versions, alpn=["h3", "hq-interop"])
    assert said(datagrams) is MATCH
    assert said(datagrams, {"quic": {"sni": "other.example.com"}}) is NO_MATCH
    assert said(datagrams, {"quic": {"alpn": "hq-interop"}}) is MATCH
    assert said(datagrams, {"quic": {"alpn": "h2"}}) is NO_MATCH
    wanted = "1" if versions[0] == V1 else "2"
    assert said(datagrams, {"quic": {"version": wanted}}) is MATCH
    assert said(datagrams, {"quic": {"version": "2" if wanted == "1" else "1"}}) is NO_MATCH


@VERSIONS
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_packet_numbers_have_one_to_four_bytes(version: int, length: int) -> None:
    number = (1 << 8 * length) - 2
    datagram = initial(crypto(0, hello()), version=version, number=number, number_length=length)
    assert name_in([datagram]) == "a.example.com"


def test_token_and_connection_ids_of_any_length_are_passed_over() -> None:
    for length in (0, 1, 8, 20):
        datagram = initial(
            crypto(0, hello()), dcid=bytes(length), scid=b"s" * length, token=b"t" * length * 9
        )
        assert name_in([datagram]) == "a.example.com"


def test_encrypted_client_hello_is_taken_by_its_outer_name() -> None:
    message = hello("public.example.com", more=extension(0xFE0D, b"\0" * 40))
    matcher = quic()
    assert matcher.match(initial(crypto(0, message)), End.FULL, None, 0) is MATCH
    assert "encrypted hello inside" in matcher.describe(initial(crypto(0, message)))


# Without conditions the header says it all.


@VERSIONS
def test_bare_word_takes_what_begins_like_a_client(version: int) -> None:
    for datagram in (initial(PING, version=version), zero_rtt(version=version)):
        assert said([datagram], "quic") is MATCH
    assert quic("quic").facts(initial(crypto(0, hello()), version=version)) == ()


@pytest.mark.parametrize("match", ["quic", NAMED], ids=["bare", "named"])
@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\xc0",
        header(0, version=0) + bytes(40),  # version negotiation
        header(0, version=0xFF00001D) + bytes(1200),  # a draft
        header(0, version=0x0A1A2A3A) + bytes(1200),  # GREASE
        header(RETRY[V1]) + bytes(40),
        header(RETRY[V2], version=V2) + bytes(40),
        header(HANDSHAKE[V1]) + b"\x40\x20" + bytes(40),
        header(0, dcid=bytes(21)) + bytes(1200),
        b"\x40" + DCID + bytes(40),  # a short header
        initial(crypto(0, hello()))[:-1],  # cut
        b"\x16\xfe\xfd" + bytes(60),
    ],
    ids=repr,
)
def test_what_is_no_beginning_is_no_match(datagram: bytes, match: object) -> None:
    assert said([datagram], match) is NO_MATCH
    assert quic(match).describe(datagram) == ""


# Hellos in pieces.


@VERSIONS
def test_hello_over_two_datagrams_is_waited_for(version: int) -> None:
    first, second = split_hello(hello(size=1800), 1000, version=version)
    assert said([first]) is NEED_MORE
    assert said([first, second]) is MATCH
    assert said([second]) is NEED_MORE
    assert said([second, first]) is MATCH
    assert quic().facts(Datagrams([second, first])) == (("sni", "a.example.com"),)


def test_datagrams_that_come_twice_change_nothing() -> None:
    first, second = split_hello(hello(size=1800), 1000)
    assert said([first, first, first]) is NEED_MORE
    assert said([first, first, second]) is MATCH


def test_keys_of_the_first_connection_id_hold_for_later_ones() -> None:
    message = hello(size=1800)
    first = initial(crypto(0, message[:1000]))
    second = initial(crypto(1000, message[1000:]), dcid=b"another", keys_of=DCID, number=1)
    assert said([first, second]) is MATCH
    # One that is protected by its own is none that the server could read.
    stranger = initial(crypto(1000, message[1000:]), dcid=b"another", number=1)
    assert said([first, stranger]) is NEED_MORE


def test_early_data_that_has_overtaken_the_hello_is_waited_with() -> None:
    assert said([zero_rtt()]) is NEED_MORE
    assert said([zero_rtt(), initial(crypto(0, hello()))]) is MATCH


@VERSIONS
def test_packets_share_a_datagram(version: int) -> None:
    message = hello(size=600)
    parts = [crypto(300, message[300:]), crypto(0, message[:300])]
    first, second = (
        initial(part, version=version, number=number, size=0) for number, part in enumerate(parts)
    )
    early = zero_rtt(version=version)
    for datagram in (
        first + second,
        second + early + first,
        first + second + early,
        first + second + bytes(100),
        first + second + b"\x40" + bytes(50),
    ):
        assert said([datagram]) is MATCH
    # What stands behind an unknown version is not reached.
    assert said([first + header(0, version=0x0A1A2A3A) + second]) is NEED_MORE


def test_acknowledgements_stand_beside_the_hello() -> None:
    plain = b"\x02" + varint(5) + varint(0) + varint(1) + varint(0) + varint(1) + varint(2)
    with_ecn = b"\x03" + varint(5) + varint(0) + varint(0) + varint(0) + varint(1) * 3
    assert said([initial(plain + with_ecn + crypto(0, hello()))]) is MATCH


@given(st.integers(0, 1 << 32), st.integers(1, 3), st.integers(0, 2500))
def test_scrambled_hello_is_read_in_any_order(seed: int, count: int, size: int) -> None:
    chance = random.Random(seed)
    datagrams = scrambled(hello(size=size), chance, count=count)
    chance.shuffle(datagrams)
    for some in range(1, len(datagrams)):
        assert said(datagrams[:some]) in (NEED_MORE, MATCH)
    assert said(datagrams) is MATCH
    assert name_in(datagrams) == "a.example.com"


def test_every_order_of_four_overlapping_pieces() -> None:
    message = hello(size=800)
    pieces = [crypto(at, message[at : at + 300]) for at in (0, 200, 400, 520)]
    for order in permutations(pieces):
        assert name_in([initial(b"".join(order))]) == "a.example.com"


# What no server would take.


def test_pieces_that_contradict_each_other_are_no_match() -> None:
    message = hello(size=600)
    other = hello("b.example.com", size=600)
    assert said([initial(crypto(0, message) + crypto(0, other))]) is NO_MATCH
    # Known as soon as both are there, not only when the gap before them is filled.
    behind = crypto(400, b"x" * 20) + crypto(410, b"y" * 20)
    assert said([initial(behind)]) is NO_MATCH
    first, second = split_hello(hello(size=1800), 1000)
    assert said([first, second, initial(crypto(5, b"\xff"), number=2)]) is NO_MATCH


def test_packet_that_does_not_decrypt_is_no_match_at_the_beginning_and_nothing_later() -> None:
    first, second = split_hello(hello(size=1800), 1000)
    broken = first[:-1] + bytes([first[-1] ^ 1])
    assert said([broken]) is NO_MATCH
    assert said([first, broken]) is NEED_MORE
    assert said([first, b"", b"\x00" * 30, broken, second]) is MATCH


@pytest.mark.parametrize(
    "frames",
    [
        crypto(0, b"\x02" + hello()[1:]),  # a ServerHello
        b"\x08" + crypto(0, hello()),  # a STREAM frame
        b"\x1e",  # HANDSHAKE_DONE
        b"\x06" + varint(0) + varint(2000) + b"x",
        crypto(140_000, b"x"),
        b"\x06" + varint(1 << 40) + varint(1) + b"x",
        b"\x02" + varint(1) + varint(1) + varint(1 << 40) + varint(0),
        crypto(0, hello("a" * 30 + "\x01.example.com")),
    ],
    ids=[
        "server-hello",
        "stream",
        "handshake-done",
        "longer-than-the-packet",
        "far-behind",
        "farther-behind",
        "acknowledges-too-much",
        "no-name",
    ],
)
def test_frames_of_no_client_are_no_match(frames: bytes) -> None:
    assert said([initial(frames)]) is NO_MATCH


def test_frame_that_ends_with_its_packet_is_no_match() -> None:
    assert said([initial(crypto(0, hello()) + b"\x06\x00\x40", size=0)]) is NO_MATCH


def test_reserved_bits_are_no_match() -> None:
    assert said([initial(crypto(0, hello()), reserved=1)]) is NO_MATCH


# Bounds.


def test_frames_and_packets_and_pieces_are_bounded() -> None:
    message = hello(size=quic_initial.MOST_FRAMES * 4)
    many = b"".join(
        crypto(at, message[at : at + 2]) for at in range(0, 2 * quic_initial.MOST_FRAMES + 2, 2)
    )
    assert said([initial(many)]) is NO_MATCH
    small = initial(PING * 4, size=0)
    assert said([small * (quic_initial.MOST_PACKETS - 1)]) is NEED_MORE
    assert said([small * (quic_initial.MOST_PACKETS + 1)]) is NO_MATCH
    with pytest.raises(ParseError, match="more than 512 pieces"):
        read_client_hello(
            tuple(
                initial(b"".join(crypto(1000 * n + 2 * at, b"x") for at in range(200)))
                for n in range(3)
            )
        )


def test_largest_datagrams_take_no_time() -> None:
    watch = Stopwatch(most_s=0.2)
    matcher = quic()
    most = 65_507
    for frames in (
        PING * 60_000,
        PADDING * 60_000,
        (PING + PADDING) * 30_000,
        crypto(0, b"\x01\x00\xff\xff" + bytes(60_000)),
        b"".join(crypto(2 * at, b"x") for at in range(250)),
    ):
        datagram = initial(frames)
        assert len(datagram) <= most
        watch.time(
            "quic",
            datagram,
            lambda datagram=datagram: matcher.match(  # type: ignore[misc]
                Datagrams([datagram] * 8), End.FULL, None, 0
            ),
        )


@given(st.data())
def test_hostile_datagrams_have_three_outcomes(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([*VECTORS.values(), *split_hello(hello(size=1500), 700)]))
    datagrams = []
    for _ in range(data.draw(st.integers(1, 3))):
        one = bytearray(base)
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, 60) | st.integers(0, len(one)))
            one[at : at + 1] = data.draw(st.binary(max_size=3))
        datagrams.append(data.draw(st.one_of(st.just(bytes(one)), st.binary(max_size=100))))
    for match in ("quic", NAMED, {"not": NAMED}):
        built = quic(match)
        first = built.match(Datagrams(datagrams), End.OPEN, None, 0)
        assert isinstance(first, Outcome)
        assert built.match(Datagrams(datagrams), End.FULL, None, 0) is first
        assert isinstance(built.describe(Datagrams(datagrams)), str)


@given(st.binary(max_size=400))
def test_any_frames_have_three_outcomes(frames: bytes) -> None:
    assert isinstance(said([initial(frames)]), Outcome)


# Options.


@pytest.mark.parametrize(
    ("options", "key", "reason"),
    [
        ({"sni": "a.test:443"}, "quic.sni", "without the port"),
        ({"sni": []}, "quic.sni", "empty list"),
        ({"alpn": "H3"}, "quic.alpn", "clients write h3"),
        ({"version": "3"}, "quic.version", "not one of 1, 2"),
        ({"version": 1.0}, "quic.version", "not one of 1, 2"),
        ({"snii": "a.test"}, "quic.snii", "did you mean sni"),
        ("a.test", "quic", "wants options in braces"),
    ],
)
def test_options_that_no_client_meets_are_errors(options: object, key: str, reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        quic({"quic": options})
    assert caught.value.key == key
    assert reason in caught.value.reason


def test_international_names_are_compared_as_clients_send_them() -> None:
    message = hello("xn--bcher-kva.example")
    assert said([initial(crypto(0, message))], {"quic": {"sni": "bücher.example"}}) is MATCH


@pytest.mark.parametrize("word", ["quic", "dtls", "wireguard"])
def test_protocols_of_datagrams_are_refused_on_streams(word: str) -> None:
    with pytest.raises(OptionError, match="it wants `protocol: udp`"):
        build(word, Terms(datagrams=False))
    build(word, Terms(datagrams=True))
    build(word, Terms())
