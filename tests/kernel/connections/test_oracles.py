"""The same first packets, cut in the same places, to us and to HAProxy, nginx and sslh: they go
to the same servers.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.core.address import Address
from tests.helpers.first_packets import CLIENTS
from tests.helpers.peers import address_text, dial, read_to_end, unused_port
from tests.helpers.programs import Named, answering, config, haproxy, nginx, rule, running
from tests.helpers.proxy_headers import ACCEPTED, REFUSED
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder


# Thousands of connections each.
pytestmark = pytest.mark.timeout(240)

# How long all of us wait for more: what is not decided by its bytes alone takes as long, and on a
# busy host the second piece comes late.
WAIT_S: Final = 2
# Connections that are open at the same time: sslh has a process for each.
BATCH: Final = 40


def answers_at_every_split(
    address: tuple[str, int],
    data: bytes,
    cuts: Sequence[int],
    read: Callable[[socket.socket], bytes] = read_to_end,
) -> dict[int, bytes]:
    """What comes back to `data` in two pieces, for each length of the first; b"" for a reset.

    The second piece is sent when the first has been read.
    """
    answers = {}
    for start in range(0, len(cuts), BATCH):
        batch = cuts[start : start + BATCH]
        with contextlib.ExitStack() as stack:
            socks = {cut: stack.enter_context(dial(address)) for cut in batch}
            for cut, sock in socks.items():
                sock.sendall(data[:cut])
            ports = {sock.getsockname()[1] for sock in socks.values()}
            wait_for(lambda ports=ports: not ports & unread(address[1]), "the first pieces read")  # type: ignore[misc]
            for cut, sock in socks.items():
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    sock.sendall(data[cut:])
            for cut, sock in socks.items():
                try:
                    answers[cut] = read(sock)
                except ConnectionResetError:
                    answers[cut] = b""
    return answers


def read_to_any_end(sock: socket.socket) -> bytes:
    """What comes before the end of file or the reset."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 20):
            data += piece
    return bytes(data)


def unread(port: int) -> set[int]:
    """The ports of those who have sent something to `port` that nobody has read yet."""
    found = set()
    for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, queues, *_ = line.split()
        if local.endswith(f":{port:04X}") and state == "01" and not queues.endswith(":00000000"):
            found.add(int(remote.rpartition(":")[2], 16))
    return found


def cuts_of(data: bytes) -> list[int]:
    """Where to cut: everywhere in the first 100 bytes, then at every 29th.

    That we take no notice of any cut is shown by tests/unit/test_first_packet_clients.py.
    """
    size = len(data)
    return [*range(1, min(size, 101)), *range(101, size, 29), size]


def compare(
    ours: tuple[str, int], theirs: tuple[str, int], names: Iterable[str] = tuple(CLIENTS)
) -> tuple[dict[str, bytes], dict[str, set[bytes]]]:
    """Where each client goes through us, and where else it goes through the other, if it does.

    Raises:
        AssertionError: where it goes through us depends on where its bytes are cut.
    """
    taken, differing = {}, {}
    with ThreadPoolExecutor(2) as both:  # what is undecided lasts as long through either
        for name in names:
            data = CLIENTS[name]
            cuts = cuts_of(data)
            # sslh closes both ends when one is through: what the client still sends meets a reset.
            answers = [
                both.submit(answers_at_every_split, ours, data, cuts),
                both.submit(answers_at_every_split, theirs, data, cuts, read_to_any_end),
            ]
            mine, others = (set(each.result().values()) for each in answers)
            assert len(mine) == 1, (name, mine)
            (taken[name],) = mine
            if others - mine:
                differing[name] = others - mine
    return taken, differing


def patient(*rules: str) -> str:
    """The configuration with these rules."""
    return config(*rules).replace("timeout: 1s", f"timeout: {WAIT_S}s")


@contextlib.contextmanager
def named(*names: str) -> Iterator[dict[str, Named]]:
    """Servers that say these names."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Named(name)) for name in names}


def test_sslh_sends_real_clients_where_we_do(start_forwarder: StartForwarder) -> None:
    port = unused_port()
    with named("ssh", "tls", "http", "xmpp", "openvpn", "adb", "rest") as servers:
        # sslh takes the word HTTP anywhere for HTTP, in the preface of HTTP/2 too.
        words = {name: "[http, http2]" if name == "http" else name for name in servers}
        words["rest"] = "any"
        forwarder = start_forwarder(
            patient(*(rule(words[name], server) for name, server in servers.items()))
        )
        command = ["sslh", "-f", "-n", "-t", str(WAIT_S), "--on-timeout", "anyprot"]
        command += ["-p", f"127.0.0.1:{port}"]
        for name, server in servers.items():
            probe = "anyprot" if name == "rest" else name
            command += [f"--{probe}", address_text(server.address)]
        with running(command, port):
            taken, differing = compare(forwarder.address, ("127.0.0.1", port))
    assert set(taken.values()) == {name.encode() for name in servers}
    # What sslh 1.20 makes of some pieces, and for it a piece is all that there is: OpenVPN is what
    # begins with the length of the rest, or with two zeroes; a stream header of XMPP is looked for
    # in too few bytes once it has been cut.
    assert differing == {
        "dns-dig": {b"openvpn"},
        "postgres-psql": {b"openvpn"},
        "postgres-psql-gss": {b"openvpn"},
        "postgres-psql-plain": {b"openvpn"},
        "openvpn-tls-crypt": {b"rest"},
        "xmpp-slixmpp": {b"rest"},
    }
    assert taken["dns-dig"] == taken["postgres-psql"] == b"rest"
    assert (taken["openvpn-tls-crypt"], taken["xmpp-slixmpp"]) == (b"openvpn", b"xmpp")


# The same conditions, as we and as HAProxy say them, in the order in which they are tried.
SAME: Final = {
    "www": (
        "{tls: {sni: [www.example.com, gnutls.example.com]}}",
        "{ req.ssl_sni -i www.example.com gnutls.example.com }",
    ),
    "h2": ("{tls: {alpn: h2}}", "{ req.ssl_alpn -m sub h2 }"),
    "tls": ("tls", "{ req.ssl_hello_type 1 }"),
    "api": ("{http: {host: api.example.com}}", "{ req.hdr(host) -i api.example.com }"),
    "http": ("[http, http2]", "HTTP"),
    "ssh": ("ssh", "{ req.payload(0,4) -m str SSH- }"),
    "alice": ("{rdp: {cookie: alice}}", "{ req.rdp_cookie(mstshash) -m str alice }"),
    "sensor": (
        "{mqtt: {client_id: sensor-7}}",
        "{ req.payload(0,0),mqtt_field_value(connect,client_identifier) -m str sensor-7 }",
    ),
    "mqtt": ("mqtt", "{ req.payload(0,0),mqtt_is_valid }"),
    "asks": ("{bytes: 'hex:0000000804d2162f'}", "{ req.payload(0,8) -m bin 0000000804d2162f }"),
    "rest": ("any", "{ always_true }"),
}


def test_haproxy_sends_real_clients_where_we_do(
    tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    port = unused_port()
    with named(*SAME) as servers:
        forwarder = start_forwarder(
            patient(*(rule(ours, servers[name]) for name, (ours, _) in SAME.items()))
        )
        lines = [f"frontend f\n  bind 127.0.0.1:{port}\n  tcp-request inspect-delay {WAIT_S}s"]
        lines += [f"  tcp-request content accept if {theirs}" for _, theirs in SAME.values()]
        lines += [f"  use_backend {name} if {theirs}" for name, (_, theirs) in SAME.items()]
        lines += [
            f"backend {name}\n  server s {address_text(server.address)}"
            for name, server in servers.items()
        ]
        with haproxy(tmp_path, port, "\n".join(lines) + "\n"):
            taken, differing = compare(forwarder.address, ("127.0.0.1", port))
    assert set(taken.values()) == {name.encode() for name in SAME}
    assert differing == {}


def test_nginx_sends_real_clients_where_we_do(
    tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    port = unused_port()
    with named("www", "gnutls", "h2", "old", "tls", "rest") as servers:
        forwarder = start_forwarder(
            patient(
                rule("{tls: {sni: gnutls.example.com}}", servers["gnutls"]),
                rule("{tls: {sni: www.example.com, version: '1.3'}}", servers["www"]),
                rule("{tls: {alpn: h2}}", servers["h2"]),
                rule("{tls: {version: '1.2'}}", servers["old"]),
                rule("tls", servers["tls"]),
                rule("any", servers["rest"]),
            )
        )
        to = {name: address_text(server.address) for name, server in servers.items()}
        stream = (
            'map "$ssl_preread_server_name/$ssl_preread_protocol/$ssl_preread_alpn_protocols"'
            " $to {\n"
            f'  "~^gnutls\\.example\\.com/" {to["gnutls"]};\n'
            f'  "~^www\\.example\\.com/TLSv1.3/" {to["www"]};\n'
            f'  "~/(.*,)?h2(,|$)" {to["h2"]};\n'
            f'  "~/TLSv1.2/" {to["old"]};\n'
            f'  "~/TLSv1" {to["tls"]};\n'
            f"  default {to['rest']};\n}}\n"
            f"server {{ listen 127.0.0.1:{port}; ssl_preread on; proxy_pass $to; }}\n"
        )
        with nginx(tmp_path, port, stream=stream):
            names = [name for name in CLIENTS if name.startswith(("tls", "ssh", "http"))]
            taken, differing = compare(forwarder.address, ("127.0.0.1", port), names)
    assert set(taken.values()) == {name.encode() for name in servers}
    assert differing == {}


def test_haproxy_reads_proxy_headers_as_we_do(tmp_path: Path) -> None:
    port = unused_port()
    headers = {name: header for name, (header, *_) in ACCEPTED.items()} | REFUSED
    heard = {}
    with haproxy(tmp_path, port, answering(port)):
        for name, header in headers.items():
            answer = b""
            with dial(("127.0.0.1", port)) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(header + b"GET / HTTP/1.0\r\n\r\n")
                answer = read_to_end(sock)
            heard[name] = answer.rpartition(b"\r\n\r\n")[2].split()[:2]
    # It wants addresses where the specification lets a proxy say that it has none that it can tell.
    unheard = {"v1-unknown-worst", "v2-unspec", "v2-unix"}
    assert {name for name in ACCEPTED if not heard[name]} == unheard
    for name in ACCEPTED.keys() - unheard:
        _, source, destination = ACCEPTED[name]
        if isinstance(source, Address) and isinstance(destination, Address):
            mapped = "::ffff:" if name == "v1-mapped" else ""  # it keeps the form of IPv6
            ends = [f"{mapped}{end.host}:{end.port}".encode() for end in (source, destination)]
            assert heard[name] == ends, name
    # It takes numbers that are none: 010 for 10, 65536 for 0, 192.0.2.256 for 192.0.3.0.
    lenient = {"leading-zero-port", "leading-zero-address", "port-too-large", "address-too-large"}
    assert {name for name in REFUSED if heard[name]} == lenient
