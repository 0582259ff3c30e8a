"""Datagrams from made-up addresses take nothing away: not from TCP, not from UDP clients.

Nor from those whose datagrams the kernel sends on; and whose addresses they are get little of it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Final, Self

import pytest

from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.udp.eviction import STEADY_AFTER_S
from tests.helpers.forged import Forger
from tests.helpers.peers import EchoServer, address_text, dial, read_exactly
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.netns import Network
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

FLOOD = 11_000
TRIES = 3
CONFIG = """
datapath: {datapath}
workers: 2
handover: {{after_bytes: 0}}
listeners:
  - name: udp
    bind: 10.1.0.1:5353
    protocol: udp
    rules: [{{match: any, to: "10.2.0.2:5300"}}]
  - {{name: tcp, bind: "10.1.0.1:9989", rules: [{{match: {{regex: "."}}, to: "10.2.0.2:{port}"}}]}}
"""


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def datagram_from(source: str, to: tuple[str, int], payload: bytes, *, port: int = 1000) -> bytes:
    """A packet with this source address (RFC 791, RFC 768; no UDP checksum)."""
    udp = struct.pack("!HHHH", port, to[1], 8 + len(payload), 0) + payload
    ends = socket.inet_aton(source) + socket.inet_aton(to[0])
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
    head = head[:10] + struct.pack("!H", checksum(head + ends))
    return head + ends + udp


def flood(network: Network, to: tuple[str, int], *, first: int, count: int, each: int = 1) -> None:
    """So many sources that nobody has, each with so many datagrams."""
    with network.entered(), socket.socket(socket.AF_INET, socket.SOCK_RAW, 255) as raw:
        for number in range(first, first + count):
            source = f"10.{99 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
            for _ in range(each):
                raw.sendto(datagram_from(source, to, b"x"), (to[0], 0))
            if number % 50 == 49:
                time.sleep(0.02)  # what the listener's queue takes: the flood is to arrive


# A client that has said one thing is copied, on every datapath.
@pytest.mark.parametrize(("datapath", "each"), [("copy", 1), ("copy", 2), ("auto", 2)])
def test_made_up_addresses_deny_nobody(
    hosts: Topology, start_forwarder: StartForwarder, datapath: str, each: int
) -> None:
    udp, tcp = ("10.1.0.1", 5353), ("10.1.0.1", 9989)
    with hosts.server.entered():
        echo = EchoServer("tcp", host="10.2.0.2")
        answers = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        answers.bind(("10.2.0.2", 5300))
    with hosts.client.entered():
        known = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        known.connect(udp)

    def heard(sock: socket.socket, said: bytes) -> tuple[str, int] | None:
        """Where that came from, if it comes within a few seconds."""
        ends_s = time.monotonic() + scaled_s(3.0)
        with contextlib.suppress(TimeoutError):
            while (left_s := ends_s - time.monotonic()) > 0:
                sock.settimeout(left_s)
                data, name = sock.recvfrom(100)
                if data == said:
                    return str(name[0]), int(name[1])
        return None

    def exchange(client: socket.socket, said: bytes) -> tuple[str, int]:
        """One datagram to the server and one back; where the server saw it from.

        As clients do: what finds a queue that is full of the flood is lost, and said again.
        """
        for _ in range(TRIES):
            client.send(said)
            source = heard(answers, said)
            if source is not None:
                answers.sendto(b"answer to " + said, source)
                if heard(client, b"answer to " + said):
                    return source
        raise AssertionError(f"{said!r} was lost {TRIES} times")

    with echo, answers, known:
        with hosts.forwarder.entered():
            daemon = start_forwarder(CONFIG.format(datapath=datapath, port=echo.address[1]))
        before = exchange(known, b"one")
        with hosts.client.entered():
            pair = dial(tcp)
        with pair:
            pair.sendall(b"hello")
            assert read_exactly(pair, 5) == b"hello"
            time.sleep(STEADY_AFTER_S)  # from then on the client is known
            assert exchange(known, b"two") == before
            sent = 0
            while daemon.look("listeners")[0]["accepted"] < FLOOD:
                assert sent < 10 * FLOOD
                # What finds a full queue does not arrive: more of them, until enough have. Not too
                # many at once: the pair's server gives up one that is silent for long.
                flood(hosts.client, udp, first=sent, count=FLOOD // 20, each=each)
                sent += FLOOD // 20
                pair.sendall(b"still here")
                assert read_exactly(pair, 10) == b"still here"
            # The session and the pair that there were go on, and new ones are made.
            assert exchange(known, b"three") == before
            pair.sendall(b"again")
            assert read_exactly(pair, 5) == b"again"
            with hosts.client.entered():
                for _ in range(23):
                    with dial(tcp) as another:
                        another.sendall(b"served")
                        assert read_exactly(another, 6) == b"served"
                for number in range(3):
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                        client.connect(udp)
                        # Not what another has said, and perhaps twice.
                        exchange(client, b"new here %d" % number)
            closed = daemon.show("stats")["closed"]
            assert "busy" not in closed
            # A slow flood makes less room necessary than ends by itself.
            assert closed.get("evicted", 0) + closed.get("idle", 0) > 0
            assert [listener["refused"] for listener in daemon.show("listeners")] == [0, 0]
        # Seconds later nothing is left of the flood but those that were sent twice.
        if each == 1:
            wait_for(
                lambda: daemon.look("listeners")[0]["open"] <= 4, "end of the flood", deadline_s=40
            )


SPLICED: Final = """
datapath: splice
workers: 1
handover: {{after_bytes: 0}}
limits: {{sessions: 1000}}
listeners:
  - name: udp
    bind: "{host}:5353"
    protocol: udp
    amplification: 3
    idle: 4s
    rules: [{{match: any, to: "{server}:5300"}}]
  - {{name: tcp, bind: "{host}:9989", rules: [{{match: {{regex: "."}}, to: "{server}:{port}"}}]}}
"""
ASKED: Final = b"short"
ANSWER: Final = b"a" * (2 * len(ASKED))  # so that two of three go to a client that has asked once


@pytest.mark.parametrize(
    ("version", "count"),
    [
        (4, 6000),
        pytest.param(6, 6000, marks=pytest.mark.soak),
        pytest.param(4, 1_000_000, marks=pytest.mark.soak),
        pytest.param(6, 1_000_000, marks=pytest.mark.soak),
    ],
)
def test_made_up_addresses_leave_spliced_sessions_and_pairs_alone(
    hosts: Topology, start_forwarder: StartForwarder, version: int, count: int, soak_s: float
) -> None:
    """So many datagrams, or those for which a soak has time."""
    host, server_host = {4: ("10.1.0.1", "10.2.0.2"), 6: ("fd01::1", "fd02::2")}[version]
    victims = {4: "10.99.0.0/16", 6: "fd99::/64"}[version]
    way = f"route replace {victims} via {host[:-1]}2 dev f0"
    hosts.forwarder.ip(way)
    with contextlib.ExitStack() as stack:
        with hosts.server.entered():
            echo = stack.enter_context(EchoServer("tcp", host=server_host))
            stack.enter_context(Answers(server_host))
        bracketed = {4: host, 6: f"[{host}]"}[version]
        text = SPLICED.format(
            host=bracketed,
            server={4: server_host, 6: f"[{server_host}]"}[version],
            port=echo.address[1],
        )
        with hosts.forwarder.entered():
            daemon = start_forwarder(text)
        with hosts.client.entered():
            pair = stack.enter_context(dial((host, 9989)))
            known = [stack.enter_context(Known(host)) for _ in range(4)]
            hosts.client.run("nft", "-f", "-", stdin=COUNT_VICTIMS[version])
        stack.callback(hosts.client.run, "nft", "delete", "table", "inet", "victims")

        def all_are_served() -> None:
            for one in known:
                one.exchange()
            pair.sendall(b"still here")
            assert read_exactly(pair, 10) == b"still here"

        def are_spliced_and_steady() -> bool:
            all_are_served()
            rows = {row["client"]: row for row in daemon.control().pairs()}
            sessions = [rows.get(one.name) for one in known]
            return all(
                row is not None
                and row["datapath"] == "splice"
                and row["age_s"] > STEADY_AFTER_S + 1
                for row in sessions
            )

        wait_for(are_spliced_and_steady, "the kernel has them")
        ids = {row["id"] for row in daemon.control().pairs()}
        joined = daemon.show("stats")["joined"]["splice"]
        forger = stack.enter_context(
            contextlib.closing(Forger(hosts.client, "c0", hosts.forwarder, "f0"))
        )
        ends_s = time.monotonic() + soak_s
        for number in range(count):
            forger.send_packet(made_up(version, number, host, ASKED), version)
            if number % 150 == 149:  # what the listener's queue takes: the flood is to arrive
                with hosts.client.entered(), Known(host) as late:
                    late.exchange()
                all_are_served()
                if number > 6000 and time.monotonic() > ends_s:
                    count = number + 1
                    break
        # Not by commands, which may take as long as a session may be idle.
        listener = daemon.look("listeners")[0]
        assert listener["accepted"] > count // 2
        stats = daemon.look("stats")
        rows = {row["id"]: row for row in daemon.control().pairs()}
        assert ids <= rows.keys()
        assert all(rows[number]["idle_s"] < 4 for number in ids)
        # None of them; of the others those that had to ask twice.
        assert stats["joined"]["splice"] <= joined + count // 150
        mine = host[:-1] + "2"
        spliced = [row for row in rows.values() if row["datapath"] == "splice"]
        assert all(mine in row["client"] for row in spliced)
        assert "busy" not in stats["closed"]
        closed = stats["closed"]
        assert closed.get("evicted", 0) + closed.get("idle", 0) > count // 3
        # A host that has sent nothing gets at most three times what was sent in its name.
        said = hosts.client.run("nft", "-j", "list", "counter", "inet", "victims", "got")
        (counter,) = (one["counter"] for one in json.loads(said)["nftables"] if "counter" in one)
        headers = {4: 28, 6: 48}[version]
        got_bytes = counter["bytes"] - headers * counter["packets"]
        assert 0 < got_bytes <= 3 * len(ASKED) * count
        assert got_bytes == len(ANSWER) * counter["packets"]
        assert stats["datagrams_held_back"] > 0

        def only_those_that_speak_are_left() -> bool:
            all_are_served()
            return bool(daemon.look("listeners")[0]["open"] == len(known))

        wait_for(only_those_that_speak_are_left, "seconds later", deadline_s=40)
        assert ids <= {row["id"] for row in daemon.control().pairs()}


COUNT_VICTIMS: Final = {
    version: f"""table inet victims {{
counter got {{ }}
chain in {{
type filter hook prerouting priority 0;
{family} daddr {net} udp sport 5353 counter name got drop
}}
}}
"""
    for version, family, net in ((4, "ip", "10.99.0.0/16"), (6, "ip6", "fd99::/64"))
}


class Known:
    """A client that goes on speaking."""

    def __init__(self, host: str) -> None:
        self.sock = socket.socket(
            socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM
        )
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect((host, 5353))
        self.name = address_text(self.sock.getsockname()[:2])

    def exchange(self) -> None:
        """Ask until there is an answer: the flood may have filled the queue that it waits in."""
        self.sock.settimeout(0.2)
        ends_s = time.monotonic() + DEADLINE_S
        while True:
            self.sock.send(b"known")
            try:
                assert self.sock.recv(100) == ANSWER
            except TimeoutError:
                assert time.monotonic() < ends_s, "nobody answers"
            else:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class Answers(threading.Thread):
    """Answers each datagram by two, of which a client that has sent once may get one."""

    def __init__(self, host: str) -> None:
        super().__init__(daemon=True)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.sock.bind((host, 5300))
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, source = self.sock.recvfrom(100)
                if not data:
                    return
                for _ in range(2 if data == ASKED else 1):
                    self.sock.sendto(ANSWER, source)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it is not connected, but a thread that waits is woken
            self.sock.shutdown(socket.SHUT_RDWR)
        self.join(timeout=DEADLINE_S)
        self.sock.close()


def made_up(version: int, number: int, host: str, payload: bytes) -> bytes:
    """A datagram of the client number `number`, whom there is not."""
    if version == 4:
        source = f"10.99.{number >> 8 & 255}.{number & 255}"
        return datagram_from(source, (host, 5353), payload, port=1000 + (number >> 16))
    source = f"fd99::{number >> 16:x}:{number & 0xFFFF:x}"
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, host)
    size = 8 + len(payload)
    head = struct.pack("!HHH", 1000, 5353, size)
    padding = bytes(len(payload) % 2)
    pseudo = ends + struct.pack("!II", size, socket.IPPROTO_UDP)
    total = checksum(pseudo + head + bytes(2) + payload + padding) or 0xFFFF
    ip = struct.pack("!IHBB", 6 << 28, size, socket.IPPROTO_UDP, 64) + ends
    return ip + head + struct.pack("!H", total) + payload
