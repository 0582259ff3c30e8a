"""The same first packets, cut in the same places, to us and to HAProxy, nginx and sslh: they go
to the same servers.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.first_packets import CLIENTS
from tests.helpers.peers import address_text, dial, read_to_end, unused_port
from tests.helpers.programs import Named, config, haproxy, rule, running

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder


def answer_to(address: tuple[str, int], first: bytes, *rest: bytes) -> bytes:
    """What comes back to these first bytes; b"" for a reset."""
    with dial(address) as sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(first)
        for piece in rest:
            sock.sendall(piece)
        return read_to_end(sock)
    return b""


def test_sslh_sends_real_clients_where_we_do(start_forwarder: StartForwarder) -> None:
    port = unused_port()
    with (
        Named("ssh") as ssh_,
        Named("tls") as tls_,
        Named("http") as http,
        Named("xmpp") as xmpp,
        Named("openvpn") as openvpn,
        Named("adb") as adb,
        Named("rest") as rest,
    ):
        named = {"ssh": ssh_, "tls": tls_, "http": http, "xmpp": xmpp, "openvpn": openvpn}
        forwarder = start_forwarder(
            config(
                rule("ssh", ssh_),
                rule("tls", tls_),
                # sslh takes the word HTTP anywhere for HTTP, in the preface of HTTP/2 too.
                rule("[http, http2]", http),
                rule("xmpp", xmpp),
                rule("openvpn", openvpn),
                rule("adb", adb),
                rule("any", rest),
            )
        )
        words = [w for name, s in named.items() for w in (f"--{name}", address_text(s.address))]
        command = ["sslh", "-f", "-n", "-t", "1", "--on-timeout", "anyprot"]
        command += ["-p", f"127.0.0.1:{port}", *words]
        with running([*command, "--adb", address_text(adb.address),
                      "--anyprot", address_text(rest.address)], port):  # fmt: skip
            answers = {
                name: (answer_to(forwarder.address, data), answer_to(("127.0.0.1", port), data))
                for name, data in CLIENTS.items()
            }
    ours = {name: mine for name, (mine, _) in answers.items()}
    assert set(ours.values()) == {b"ssh", b"tls", b"http", b"xmpp", b"openvpn", b"adb", b"rest"}
    differing = {name: both for name, both in answers.items() if both[0] != both[1]}
    # To sslh 1.20 every segment is OpenVPN that begins with its own length, as a DNS query does.
    assert differing == {"dns-dig": (b"rest", b"openvpn")}


@pytest.mark.parametrize("name", ["tls-chrome", "tls-openssl", "tls-openssl-1.2", "tls-gnutls"])
def test_haproxy_reads_the_same_name_at_every_split(
    name: str, tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    data = CLIENTS[name]
    port = unused_port()
    with Named("www") as www, Named("other") as other:
        forwarder = start_forwarder(
            config(rule("{tls: {sni: [www.example.com, gnutls.example.com]}}", www),
                   rule("any", other))
        )  # fmt: skip
        sections = (
            f"frontend f\n  bind 127.0.0.1:{port}\n  tcp-request inspect-delay 5s\n"
            "  tcp-request content accept if { req.ssl_hello_type 1 }\n"
            "  use_backend www if { req.ssl_sni -i www.example.com gnutls.example.com }\n"
            f"  default_backend other\nbackend www\n  server s {address_text(www.address)}\n"
            f"backend other\n  server s {address_text(other.address)}\n"
        )
        with haproxy(tmp_path, port, sections):
            for cut in (1, 3, 5, 6, 43, 100, len(data) // 2, len(data) - 1, len(data)):
                ours = answer_to(forwarder.address, data[:cut], data[cut:])
                theirs = answer_to(("127.0.0.1", port), data[:cut], data[cut:])
                assert ours == theirs == (b"other" if name == "tls-openssl-1.2" else b"www"), cut
