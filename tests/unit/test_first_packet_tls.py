"""ClientHellos: split, fragmented, broken, and what they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.first_packet.client_hello import ClientHello
from pyforwarder.core.first_packet.cursor import ParseError, Truncated
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome
from pyforwarder.core.first_packet.tls import _read_plain_hello, read_client_hello
from tests.helpers.first_packets import CLIENTS, decided_after, matcher, mutated_clients, said

NAMED = matcher({"tls": {"sni": "a.example"}})


def sized(data: bytes, size: int) -> bytes:
    """A vector: its length in `size` bytes, then the bytes."""
    return len(data).to_bytes(size, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + sized(data, 2)


def server_name(name: bytes) -> bytes:
    return extension(0, sized(b"\0" + sized(name, 2), 2))


def alpn(*names: bytes) -> bytes:
    return extension(16, sized(b"".join(sized(name, 1) for name in names), 2))


def versions(*numbers: int) -> bytes:
    return extension(43, sized(b"".join(n.to_bytes(2, "big") for n in numbers), 1))


def message(*extensions: bytes, legacy: int = 0x0303, session: bytes = b"") -> bytes:
    body = legacy.to_bytes(2, "big") + bytes(32) + sized(session, 1)
    body += sized(b"\x13\x01\x0a\x0a", 2) + sized(b"\0", 1)
    if extensions:
        body += sized(b"".join(extensions), 2)
    return b"\x01" + sized(body, 3)


def records(handshake: bytes, *sizes: int) -> bytes:
    """The message in records of these sizes; the rest in one more."""
    result = b""
    for size in (*sizes, len(handshake)):
        piece, handshake = handshake[:size], handshake[size:]
        if piece:
            result += b"\x16\x03\x01" + sized(piece, 2)
    return result


HELLO = message(server_name(b"a.example"), alpn(b"h2", b"http/1.1"), versions(0x0304, 0x0303))


def test_what_a_hello_says() -> None:
    assert read_client_hello(records(HELLO)) == ClientHello(
        "a.example", (b"h2", b"http/1.1"), 0x0304, is_encrypted=False
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 50, len(HELLO) - 1, len(HELLO)])
def test_a_hello_in_several_records(size: int) -> None:
    data = records(HELLO, *[size] * (len(HELLO) // size))
    assert decided_after(NAMED, data) == (MATCH, len(data))
    assert said(NAMED, data + b"\x14\x03\x03\0\x01\x01") is MATCH


@given(st.lists(st.integers(1, 60), max_size=8))
def test_the_cut_into_records_says_nothing(sizes: list[int]) -> None:
    assert read_client_hello(records(HELLO, *sizes)) == read_client_hello(records(HELLO))


def test_a_hello_larger_than_a_record() -> None:
    # A post-quantum key share of Classic McEliece would not fit into one.
    big = message(extension(51, bytes(40_000)), server_name(b"a.example"))
    data = records(big, 16384, 16384)
    assert said(NAMED, data) is MATCH
    assert said(NAMED, data[:-1]) is NEED_MORE


def test_a_hello_without_extensions_has_no_name() -> None:
    assert read_client_hello(records(message(legacy=0x0301))) == ClientHello(
        None, (), 0x0301, is_encrypted=False
    )
    assert said(NAMED, records(message())) is NO_MATCH


def test_grease_is_no_version() -> None:
    hello = records(message(versions(0x7A7A, 0x0303, 0xFAFA, 0x0302)))
    assert read_client_hello(hello).version == 0x0303
    assert said({"tls": {"version": "1.2"}}, hello) is MATCH


@pytest.mark.parametrize("name", ["tls-chrome", "tls-firefox"])
def test_of_an_encrypted_hello_the_outer_name_is_seen(name: str) -> None:
    hello = read_client_hello(CLIENTS[name])
    assert hello.is_encrypted
    assert hello.server_name == "www.example.com"


def test_names_are_compared_without_case_and_final_dot() -> None:
    assert said(NAMED, records(message(server_name(b"A.Example.")))) is MATCH
    assert said({"tls": {"sni": "A.EXAMPLE."}}, records(HELLO)) is MATCH


BROKEN = {
    "sslv2": bytes.fromhex("802e0100020015000000100100800200800300800400800500800600400700c0"),
    "alert": b"\x15\x03\x01\0\x02\x02\x28",
    "server-hello": b"\x16\x03\x03\0\x30\x02",
    "record-of-nothing": b"\x16\x03\x01\0\0",
    "record-too-long": b"\x16\x03\x01\x40\x01\x01",
    "version-of-record": b"\x16\x02\0",
    "message-too-long": b"\x16\x03\x01\x40\0\x01\x02\x01\x45",
    "other-record-between": records(HELLO, 30)[:35] + b"\x17\x03\x03\0\x10",
    "session-of-33": records(message(server_name(b"a.example"), session=bytes(33))),
    "two-names": records(message(extension(0, sized((b"\0" + sized(b"a.example", 2)) * 2, 2)))),
    "name-twice": records(message(server_name(b"a.example"), server_name(b"a.example"))),
    "empty-name": records(message(server_name(b""))),
    "name-with-nul": records(message(server_name(b"a.example\0"))),
    "name-not-ascii": records(message(server_name(b"\xe4.example"))),
    "list-beyond-extension": records(message(extension(0, b"\0\xff\0\0\x01a"))),
    "bytes-after-the-list": records(message(extension(0, sized(b"\0" + sized(b"a", 2), 2) + b"x"))),
    "empty-alpn": records(message(alpn(b""), server_name(b"a.example"))),
    "odd-versions": records(message(extension(43, sized(b"\3", 1)), server_name(b"a.example"))),
    "extensions-beyond": records(b"\x01" + sized(HELLO[4:-3], 3)),
    "bytes-after-extensions": records(b"\x01" + sized(HELLO[4:] + b"x", 3)),
    "too-many-records": records(HELLO + bytes(0), *[1] * 3)[:18] + b"\x16\x03\x01\0\x01\0" * 600,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_hello_is_no_match(name: str) -> None:
    assert decided_after(NAMED, BROKEN[name])[0] is NO_MATCH


@pytest.mark.parametrize(
    ("data", "after"),
    [(b"\x15", 1), (b"\x16\x02", 2), (b"\x16\x03\x05", 3), (b"\x16\x03\x01\x40\x01", 5)],
)
def test_the_first_wrong_byte_is_enough(data: bytes, after: int) -> None:
    assert decided_after("tls", data + b"\x01" * 9) == (NO_MATCH, after)


@given(st.binary(max_size=120), st.integers(0, len(HELLO)))
def test_a_hello_cut_anywhere_with_random_bytes(tail: bytes, cut: int) -> None:
    try:
        hello = read_client_hello(records(HELLO)[: cut + 5] + tail)
    except (Truncated, ParseError):
        return
    assert isinstance(hello, ClientHello)


@given(st.data())
def test_one_changed_byte_never_makes_two_answers(data: st.DataObject) -> None:
    hello = bytearray(records(HELLO))
    hello[data.draw(st.integers(0, len(hello) - 1))] = data.draw(st.integers(0, 255))
    assert isinstance(decided_after(NAMED, bytes(hello))[0], Outcome)


# The short way of reading, for a hello that is as usual.

TLS_CLIENTS = tuple(name for name in CLIENTS if name.startswith("tls-"))


@st.composite
def hellos(draw: st.DrawFn) -> bytes:
    """Hellos in one record, with what the reader looks at, well made or not, and a byte changed."""
    extensions = [
        draw(
            st.one_of(
                st.builds(server_name, st.sampled_from([b"", b"a", b"A.b.", b"a b", b"\xe4"])),
                st.builds(lambda names: alpn(*names), st.lists(st.binary(max_size=3), max_size=3)),
                st.builds(
                    lambda numbers: versions(*numbers),
                    st.lists(st.sampled_from([0x0300, 0x0302, 0x0303, 0x0304, 0x7A7A])),
                ),
                st.builds(
                    extension, st.sampled_from([0, 10, 16, 43, 0xFE0D]), st.binary(max_size=9)
                ),
            )
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    session = draw(st.binary(max_size=3)) * draw(st.sampled_from([1, 1, 11]))
    data = bytearray(records(message(*extensions, session=session)) + draw(st.binary(max_size=3)))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.one_of(st.integers(0, 255), st.just((data[at] + 1) & 0xFF)))
    return bytes(data)


@given(st.one_of(hellos(), mutated_clients(TLS_CLIENTS)))
def test_the_short_way_reads_what_the_long_one_does(data: bytes) -> None:
    plain = _read_plain_hello(data)
    assert plain is None or plain == read_client_hello(data)


@pytest.mark.parametrize("name", TLS_CLIENTS)
def test_the_short_way_is_that_of_real_clients(name: str) -> None:
    assert _read_plain_hello(CLIENTS[name]) == read_client_hello(CLIENTS[name])


@pytest.mark.parametrize("name", BROKEN)
def test_the_short_way_leaves_what_is_broken_to_the_long_one(name: str) -> None:
    assert _read_plain_hello(BROKEN[name]) is None
