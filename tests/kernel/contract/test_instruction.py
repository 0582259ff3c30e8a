"""The instruction, seen from a client: every answer, every way to cut it, every kind of address."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from tests.helpers.instruction import ACK, framed, instruction, refusal
from tests.helpers.netns import blackhole
from tests.helpers.peers import (
    AnswerServer,
    EchoServer,
    NameServer,
    Waiting,
    address_text,
    dial,
    dial_through,
    ends_with_reset,
    read_exactly,
    read_to_end,
    unused_port,
)

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

pytestmark = pytest.mark.copied

CONFIG = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    first_packet: {timeout: 1500ms}
    rules: [{name: named, match: instruction, allow: [loopback, "11.0.0.0/8"]}]
  - name: required
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback], checksum: required}]
  - name: quiet
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback], ack: false}]
  - name: six
    bind: "[::1]:0"
    rules: [{match: instruction, allow: [loopback]}]
timeouts: {connect: 500ms}
"""


@pytest.fixture(scope="module")
def forwarder(start_shared_forwarder: StartForwarder) -> Daemon:
    return start_shared_forwarder(CONFIG)


def hears_nothing(client: socket.socket, *, for_s: float) -> None:
    """The forwarder had that long to read what was sent, and rightly said nothing."""
    deadline_s = client.gettimeout()
    client.settimeout(for_s)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(deadline_s)


def answer_to(address: tuple[str, int], first_packet: bytes) -> bytes:
    """Everything the forwarder sends before it closes cleanly."""
    with dial(address) as client:
        client.sendall(first_packet)
        return read_to_end(client)


def test_the_examples_of_the_documentation_are_right() -> None:
    assert instruction("127.0.0.1:9001") == b"18127.0.0.1:900102"
    assert framed(b"OK") == b"06OK56"
    assert refusal("denied") == b"14ERR denied83"


def test_a_client_is_connected_and_told_so(forwarder: Daemon) -> None:
    with (
        AnswerServer("alpha") as alpha,
        AnswerServer("beta") as beta,
        dial_through(forwarder.address, alpha.address) as to_alpha,
        dial_through(forwarder.address, beta.address) as to_beta,
    ):
        to_alpha.sendall(b"one")
        to_beta.sendall(b"two")
        assert to_alpha.recv(100) == b"alpha got one"
        assert to_beta.recv(100) == b"beta got two"


def test_the_instruction_may_be_split_at_any_byte(forwarder: Daemon) -> None:
    with EchoServer() as echo:
        text = instruction(address_text(echo.address))
        for cut in range(1, len(text)):
            with dial(forwarder.address) as client:
                client.sendall(text[:cut])
                hears_nothing(client, for_s=0.003)
                client.sendall(text[cut:] + b"payload")
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == ACK + b"payload", cut


def test_the_instruction_may_come_byte_by_byte(forwarder: Daemon) -> None:
    with EchoServer() as echo, dial(forwarder.address) as client:
        *first, last = instruction(address_text(echo.address))
        for byte in first:
            client.sendall(bytes([byte]))
            hears_nothing(client, for_s=0.005)
        client.sendall(bytes([last]))
        assert read_exactly(client, 6) == ACK
        client.sendall(b"payload")
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b"payload"


def test_payload_in_the_same_segment_belongs_to_the_server(forwarder: Daemon) -> None:
    with Waiting() as waiting, dial(forwarder.address) as client:
        client.sendall(instruction(address_text(waiting.address)) + b"06OK56 is payload")
        with waiting.accept() as server:
            assert read_exactly(server, 17) == b"06OK56 is payload"
            assert read_exactly(client, 6) == ACK


def test_payload_before_the_ack_is_kept(forwarder: Daemon) -> None:
    with blackhole() as address, dial(forwarder.address) as client:
        client.sendall(instruction(address_text(address)) + b"x" * 100_000)
        # Not lost and not in the way: the refusal still comes through.
        assert read_to_end(client) == refusal("timeout")
    with Waiting() as waiting, dial(forwarder.address) as client:
        payload = bytes(range(256)) * 400
        client.sendall(instruction(address_text(waiting.address)))
        client.sendall(payload)
        client.shutdown(socket.SHUT_WR)
        with waiting.accept() as server:
            assert read_to_end(server) == payload
            server.sendall(b"late answer")
            server.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == ACK + b"late answer"


def test_a_server_that_speaks_first_is_heard_after_the_ack(forwarder: Daemon) -> None:
    with NameServer("greeting") as server:
        assert answer_to(forwarder.address, instruction(address_text(server.address))) == (
            ACK + b"greeting"
        )


def test_ipv6_destinations_and_listeners(forwarder: Daemon) -> None:
    with NameServer("six", host="::1") as server:
        text = instruction(address_text(server.address))
        assert answer_to(forwarder.address, text) == ACK + b"six"
        assert answer_to(forwarder.listeners()["six"], text) == ACK + b"six"


def test_an_ipv6_listener_reaches_an_ipv4_server(forwarder: Daemon) -> None:
    with NameServer("four") as server:
        text = instruction(address_text(server.address))
        assert answer_to(forwarder.listeners()["six"], text) == ACK + b"four"


def test_names_are_resolved(forwarder: Daemon) -> None:
    with NameServer("by name") as server:
        text = instruction(f"localhost:{server.address[1]}")
        assert answer_to(forwarder.address, text) == ACK + b"by name"


def test_an_unchecked_sum_is_accepted_by_a_lenient_rule(forwarder: Daemon) -> None:
    with NameServer("unchecked") as server:
        text = instruction(address_text(server.address), checked=False)
        assert answer_to(forwarder.address, text) == ACK + b"unchecked"


def test_an_unchecked_sum_is_malformed_where_the_sum_is_required(forwarder: Daemon) -> None:
    with Waiting() as waiting:
        text = instruction(address_text(waiting.address), checked=False)
        if text == instruction(address_text(waiting.address)):
            text = instruction(f"127.0.0.2:{waiting.address[1]}", checked=False)
        assert answer_to(forwarder.listeners()["required"], text) == refusal("malformed")
        assert waiting.nobody_came()


def test_a_right_sum_is_accepted_where_the_sum_is_required(forwarder: Daemon) -> None:
    with NameServer("checked") as server:
        text = instruction(address_text(server.address))
        assert answer_to(forwarder.listeners()["required"], text) == ACK + b"checked"


def test_a_sum_that_comes_out_as_00_is_right_where_it_is_required(forwarder: Daemon) -> None:
    for last in range(1, 255):
        for port in range(20_000, 20_100):
            text = instruction(f"127.0.0.{last}:{port}")
            if text.endswith(b"00"):
                with Waiting(f"127.0.0.{last}", port) as waiting:
                    with dial(forwarder.listeners()["required"]) as client:
                        client.sendall(text)
                        assert read_exactly(client, 6) == ACK
                    waiting.accept().close()
                return
    raise AssertionError("no such address")


def test_a_wrong_sum_is_malformed(forwarder: Daemon) -> None:
    with Waiting() as waiting:
        text = instruction(address_text(waiting.address))
        wrong = text[:-2] + b"%02d" % ((int(text[-2:]) + 1) % 100 or 1)
        for name in ("main", "required"):
            assert answer_to(forwarder.listeners()[name], wrong) == refusal("malformed")
        assert waiting.nobody_came()


@pytest.mark.parametrize(
    "body",
    [
        b"OK",
        b"127.0.0.1",
        b"127.0.0.1:",
        b"127.0.0.1:0",
        b"127.0.0.1:65536",
        b"127.0.0.1:12a4",
        b"127.0.0.1:-123",
        b"127.0.0.1:+123",
        b"256.0.0.1:1234",
        b"::1:1234",
        b"[::1:1234",
        b"[::1]1234",
        b"[127.0.0.1]:1234",
        b"[fe80::1%lo]:1234",
        b":1234",
        b"local host:1234",
        b"localhost\0:1234",
        b"\xff\xfe\xfd:1234",
    ],
)
def test_an_instruction_without_a_destination_is_malformed(forwarder: Daemon, body: bytes) -> None:
    assert answer_to(forwarder.address, framed(body)) == refusal("malformed")


def test_sum_digits_that_are_none_are_malformed(forwarder: Daemon) -> None:
    text = instruction(f"127.0.0.1:{unused_port()}")
    for check in (b"0x", b" 1", b"-1", b"\xb9\xb2"):
        assert answer_to(forwarder.address, text[:-2] + check) == refusal("malformed"), check


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"05abc",
        b"00",
        b"1a",
        b" 18127",
        b"\0" * 64,
    ],
)
def test_what_cannot_begin_an_instruction_is_no_match_and_reset(
    forwarder: Daemon, garbage: bytes
) -> None:
    with dial(forwarder.address) as client:
        client.sendall(garbage)
        assert ends_with_reset(client) == b""


def test_a_destination_that_is_not_allowed_is_denied(forwarder: Daemon) -> None:
    assert answer_to(forwarder.address, instruction("10.1.2.3:80")) == refusal("denied")


def test_a_closed_port_is_refused(forwarder: Daemon) -> None:
    text = instruction(f"127.0.0.1:{unused_port()}")
    assert answer_to(forwarder.address, text) == refusal("refused")


def test_a_network_without_a_route_is_unreachable(forwarder: Daemon) -> None:
    assert answer_to(forwarder.address, instruction("11.1.2.3:80")) == refusal("unreachable")


def test_a_server_that_never_answers_the_connect_is_a_timeout(forwarder: Daemon) -> None:
    with blackhole() as address:
        text = instruction(address_text(address))
        assert answer_to(forwarder.address, text) == refusal("timeout")


def test_a_name_that_nobody_knows_is_unresolved(forwarder: Daemon) -> None:
    text = instruction("no-such-name.invalid:80")
    assert answer_to(forwarder.address, text) == refusal("unresolved")


def test_half_an_instruction_is_a_timeout(forwarder: Daemon) -> None:
    text = instruction(f"127.0.0.1:{unused_port()}")
    assert answer_to(forwarder.address, text[:7]) == refusal("timeout")


def test_without_ack_the_server_is_all_that_is_heard(forwarder: Daemon) -> None:
    quiet = forwarder.listeners()["quiet"]
    with NameServer("only me") as server:
        assert answer_to(quiet, instruction(address_text(server.address))) == b"only me"
    with EchoServer() as echo, dial(quiet) as client:
        client.sendall(instruction(address_text(echo.address)) + b"payload")
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b"payload"


def test_without_ack_a_refusal_is_a_close_and_no_word(forwarder: Daemon) -> None:
    text = instruction(f"127.0.0.1:{unused_port()}")
    with dial(forwarder.listeners()["quiet"]) as client:
        client.sendall(text)
        try:
            assert client.recv(100) == b""
        except ConnectionResetError:
            return  # just as silent


def test_a_refusal_reaches_a_client_that_has_sent_much_more(forwarder: Daemon) -> None:
    """Unread bytes turn a close into a reset, which would destroy the answer in flight."""
    text = instruction(f"127.0.0.1:{unused_port()}")
    for _ in range(20):
        with dial(forwarder.address) as client:
            client.sendall(text + b"x" * 50_000)
            assert read_to_end(client) == refusal("refused")


def test_a_client_that_half_closes_behind_its_instruction_is_served(forwarder: Daemon) -> None:
    with NameServer("served") as server, dial(forwarder.address) as client:
        client.send(instruction(address_text(server.address)), socket.MSG_MORE)
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == ACK + b"served"
