"""PROXY headers in front of us and behind us: the client's address, and what counts as carried."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address
from pyforwarder.core.first_packet.outcome import NEED_MORE
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.peers import (
    AnswerServer,
    Waiting,
    address_text,
    dial,
    ends_with_reset,
    pattern,
    read_exactly,
    read_to_end,
)
from tests.helpers.proxy_headers import DECLARED, DECLARED_CLIENT, DECLARED_SERVER
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder


def accepting(
    *rules: str, trusted: str = "127.0.0.0/8", timeout: str = "5s", more: str = ""
) -> str:
    lines = "".join(f"      - {rule}\n" for rule in rules)
    return (
        "listeners:\n  - name: main\n    bind: 127.0.0.1:0\n"
        f"    proxy_protocol: {{accept: true, trusted: [{trusted}]}}\n"
        f"    first_packet: {{timeout: {timeout}, max_bytes: 1KiB}}\n    rules:\n{lines}{more}"
    )


def sending(form: str, server: tuple[str, int], *, datapath: str = "auto") -> str:
    return (
        f"listeners:\n  - name: main\n    bind: 127.0.0.1:0\n    datapath: {datapath}\n"
        "    rules: [{match: any, to: web}]\n"
        f"upstreams: {{web: {{servers: ['{address_text(server)}'], send_proxy: {form}}}}}\n"
    )


def closed(forwarder: Daemon, reason: str) -> int:
    found = forwarder.show("stats")["closed"].get(reason, 0)
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize("version", DECLARED)
def test_the_header_has_the_clients_address(version: str, start_forwarder: StartForwarder) -> None:
    with AnswerServer("known") as known, AnswerServer("other") as other:
        forwarder = start_forwarder(
            accepting(
                f"{{match: {{client: 192.0.2.0/24}}, to: '{address_text(known.address)}'}}",
                f"{{match: any, to: '{address_text(other.address)}'}}",
            )
        )
        with dial(forwarder.address) as sock:
            sock.sendall(DECLARED[version] + b"payload")
            row = forwarder.wait_for_pair(lambda row: row["state"] == "joined")
            assert row["client"] == str(DECLARED_CLIENT)
            assert row["server"] == address_text(known.address)
            sock.shutdown(socket.SHUT_WR)
            assert read_to_end(sock) == b"known got payload"


@pytest.mark.parametrize("version", DECLARED)
def test_a_header_may_come_byte_by_byte(version: str, start_forwarder: StartForwarder) -> None:
    with AnswerServer("server") as server:
        forwarder = start_forwarder(accepting("{match: instruction, allow: [loopback]}"))
        with dial(forwarder.address) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in DECLARED[version] + instruction(address_text(server.address)):
                sock.sendall(bytes([byte]))
            assert read_exactly(sock, len(ACK)) == ACK
            sock.sendall(b"payload")
            sock.shutdown(socket.SHUT_WR)
            assert read_to_end(sock) == b"server got payload"


def test_carried_bytes_are_those_behind_the_header(start_forwarder: StartForwarder) -> None:
    payload = pattern(300_007)
    with Waiting() as server:
        forwarder = start_forwarder(
            accepting("{match: instruction, allow: [loopback], datapath: sockmap}")
        )
        with dial(forwarder.address) as sock:
            sock.sendall(DECLARED["v2"] + instruction(address_text(server.address)) + payload[:999])
            with server.accept() as served:
                assert read_exactly(sock, len(ACK)) == ACK
                sock.sendall(payload[999:])
                assert read_exactly(served, len(payload)) == payload
                forwarder.wait_for_pair(lambda row: row["up_bytes"] == len(payload))


@pytest.mark.parametrize("wrong", [b"GET / HTTP/1.1\r\n\r\n", b"PROXY TCP9 1", b"\r\n\r\nQ"])
def test_a_connection_without_a_header_is_reset(
    wrong: bytes, start_forwarder: StartForwarder
) -> None:
    with Waiting() as server:
        forwarder = start_forwarder(
            accepting(f"{{match: any, to: '{address_text(server.address)}'}}")
        )
        with dial(forwarder.address) as sock:
            sock.sendall(wrong)
            assert ends_with_reset(sock) == b""
        assert server.nobody_came()
        assert closed(forwarder, "malformed") == 1


def test_half_a_header_and_an_end_is_a_reset(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(accepting("{match: any, reject: close}"))
    with dial(forwarder.address) as sock:
        sock.sendall(DECLARED["v1"][:20])
        sock.shutdown(socket.SHUT_WR)
        assert ends_with_reset(sock) == b""
    assert closed(forwarder, "malformed") == 1


def test_silence_instead_of_a_header_is_no_silence_of_a_client(
    start_forwarder: StartForwarder,
) -> None:
    with Waiting() as server:
        forwarder = start_forwarder(
            accepting(f"{{match: silence, to: '{address_text(server.address)}'}}", timeout="300ms")
        )
        with dial(forwarder.address) as sock:
            assert ends_with_reset(sock) == b""
        assert closed(forwarder, "timeout") == 1
        with dial(forwarder.address) as sock:
            sock.sendall(DECLARED["v1"])
            server.accept().close()


def test_nobody_but_the_trusted_is_believed(start_forwarder: StartForwarder) -> None:
    with Waiting() as server:
        forwarder = start_forwarder(
            accepting(
                f"{{match: any, to: '{address_text(server.address)}'}}", trusted="127.0.0.2/32"
            )
        )
        # The reset may be there before connect(2) has returned.
        with contextlib.suppress(ConnectionResetError), dial(forwarder.address) as sock:
            assert ends_with_reset(sock) == b""
        assert server.nobody_came()
        assert closed(forwarder, "denied") == 1
        with socket.create_connection(
            forwarder.address, timeout=scaled_s(10), source_address=("127.0.0.2", 0)
        ) as sock:
            sock.sendall(DECLARED["v1"])
            server.accept().close()


def test_a_proxys_own_check_is_a_connection_of_the_proxy(start_forwarder: StartForwarder) -> None:
    with Waiting() as server:
        forwarder = start_forwarder(
            accepting(f"{{match: any, to: '{address_text(server.address)}'}}")
        )
        with dial(forwarder.address) as sock:
            sock.sendall(proxy_protocol.build_v2(None, None, is_local=True))
            with server.accept():
                row = forwarder.wait_for_pair(lambda row: row["state"] == "joined")
                assert row["client"] == address_text(sock.getsockname())


def test_the_limit_per_client_counts_the_clients_behind_the_proxy(
    start_forwarder: StartForwarder,
) -> None:
    with AnswerServer("server") as server:
        forwarder = start_forwarder(
            accepting(
                "{match: instruction, allow: [loopback]}", more="limits: {pairs_per_client: 1}\n"
            )
        )
        wanted = instruction(address_text(server.address))
        others = proxy_protocol.build_v1(Address("192.0.2.8", 1), DECLARED_SERVER)
        with dial(forwarder.address) as first, dial(forwarder.address) as second:
            first.sendall(DECLARED["v1"] + wanted)
            assert read_exactly(first, len(ACK)) == ACK
            second.sendall(others + wanted)
            assert read_exactly(second, len(ACK)) == ACK
            with dial(forwarder.address) as third:
                third.sendall(DECLARED["v2"] + wanted)
                assert read_to_end(third) == refusal("busy")

        def is_free_again() -> bool:
            with dial(forwarder.address) as sock:
                sock.sendall(DECLARED["v1"] + wanted)
                return sock.recv(len(ACK)) == ACK

        wait_for(is_free_again, "the place of a client that has gone")


def receive_header(served: socket.socket) -> tuple[proxy_protocol.Header, bytes]:
    """The header a server is sent, and what came with it."""
    data = b""
    while True:
        data += served.recv(4096)
        header = proxy_protocol.read(data)
        if header is not NEED_MORE:
            assert isinstance(header, proxy_protocol.Header)
            return header, data[header.length :]


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("datapath", ["copy", "sockmap"])
def test_the_server_is_told_the_clients_address_first(
    form: str, datapath: str, start_forwarder: StartForwarder
) -> None:
    payload = pattern(70_001)
    with Waiting() as server:
        forwarder = start_forwarder(sending(form, server.address, datapath=datapath))
        with dial(forwarder.address) as sock, server.accept() as served:
            header, rest = receive_header(served)
            assert header.source == Address(*sock.getsockname())
            assert header.destination == Address(*forwarder.address)
            assert rest == b""
            sock.sendall(payload)
            assert read_exactly(served, len(payload)) == payload
            served.sendall(b"answer")
            assert read_exactly(sock, 6) == b"answer"
            row = forwarder.wait_for_pair(
                lambda row: (row["up_bytes"], row["down_bytes"]) == (len(payload), 6)
            )
            ids = [value for kind, value in header.tlvs if kind == proxy_protocol.TLV_UNIQUE_ID]
            assert ids == ([b"%d" % row["id"]] if form == "v2" else [])


def test_a_rule_overrides_its_upstream_and_first_bytes_follow_the_header(
    start_forwarder: StartForwarder,
) -> None:
    with Waiting() as server:
        config = sending("v1", server.address).replace(
            "{match: any, to: web}",
            "{match: {bytes: A}, to: web, send_proxy: 'off'}, {match: any, to: web}",
        )
        forwarder = start_forwarder(config)
        with dial(forwarder.address) as sock:
            sock.sendall(b"A first")
            with server.accept() as served:
                assert read_exactly(served, 7) == b"A first"
        with dial(forwarder.address) as sock:
            sock.sendall(b"B first")
            with server.accept() as served:
                header, rest = receive_header(served)
                assert header.source == Address(*sock.getsockname())
                assert rest + read_exactly(served, 7 - len(rest)) == b"B first"


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_a_chain_of_proxies_tells_of_the_first_client(
    form: str, start_forwarder: StartForwarder
) -> None:
    with Waiting() as server:
        forwarder = start_forwarder(
            accepting(f"{{match: any, to: '{address_text(server.address)}', send_proxy: {form}}}")
        )
        with dial(forwarder.address) as sock:
            sock.sendall(DECLARED["v2"])
            with server.accept() as served:
                header, _ = receive_header(served)
                assert (header.source, header.destination) == (DECLARED_CLIENT, DECLARED_SERVER)
