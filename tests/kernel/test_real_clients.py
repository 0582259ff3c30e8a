"""Programs that people use, through rules that were written for them."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers import programs
from tests.helpers.daemon import COMMAND
from tests.helpers.peers import NameServer, address_text, unused_port
from tests.helpers.programs import WebServer, at, config, curl, rule, run, ssh
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs.make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    return programs.server_context(certificate)


# TLS and HTTP: the same port, other servers.


def test_openssl_gets_to_the_server_it_names(
    tls: ssl.SSLContext, start_forwarder: StartForwarder
) -> None:
    with (
        WebServer("first", context=tls) as first,
        WebServer("second", context=tls) as second,
        WebServer("h2", context=tls) as h2,
        WebServer("nameless", context=tls) as nameless,
    ):
        forwarder = start_forwarder(
            config(
                rule("{tls: {sni: first.example}}", first),
                rule("{tls: {sni: ['*.second.example']}}", second),
                rule("{tls: {alpn: h2}}", h2),
                rule("tls", nameless),
            )
        )
        for words, name in (
            (["-servername", "first.example"], "first"),
            (["-servername", "FIRST.example", "-tls1_2"], "first"),
            (["-servername", "a.second.example"], "second"),
            (["-servername", "second.example", "-alpn", "http/1.1,h2"], "h2"),
            (["-servername", "second.example"], "nameless"),
            (["-noservername"], "nameless"),
        ):
            client = ["openssl", "s_client", "-quiet", "-connect", at(forwarder), *words]
            answer = run(*client, "-ign_eof", stdin="GET / HTTP/1.0\r\n\r\n")
            assert answer.endswith(f"\n{name}: GET /\n"), words


def test_curl_gets_to_the_host_it_names(
    tls: ssl.SSLContext, start_forwarder: StartForwarder
) -> None:
    with (
        WebServer("api") as api,
        WebServer("site") as site,
        WebServer("tls", context=tls) as secure,
    ):
        forwarder = start_forwarder(
            config(
                rule("{http: {host: api.example, path: ['/v1/*']}}", api),
                rule("{http: {host: ['*.example']}}", site),
                rule("{tls: {sni: www.example}}", secure),
                "{match: any, reject: reset}",
            )
        )
        host, port = forwarder.address
        to = ["--connect-to", f"::{host}:{port}"]
        assert curl(*to, "http://api.example/v1/x") == "api: GET /v1/x\n"
        assert curl(*to, "http://api.example/v2/x") == "site: GET /v2/x\n"
        assert curl(*to, "http://www.example:8080/") == "site: GET /\n"
        assert curl(*to, "-k", "https://www.example/s") == "tls: GET /s\n"
        assert curl(*to, "http://www.example.org/", fails_with=56) == ""  # reset


# The client names the destination.


@pytest.mark.parametrize("scheme", ["socks4", "socks4a", "socks5", "socks5h"])
def test_curl_through_socks(scheme: str, start_forwarder: StartForwarder) -> None:
    with WebServer("web") as web:
        forwarder = start_forwarder(config("{match: socks, allow: ['127.0.0.0/8']}"))
        proxy = ["-x", f"{scheme}://{at(forwarder)}"]
        # SOCKS 4 without `a` and 5 without `h` resolve the name themselves.
        assert curl(*proxy, "-4", f"http://localhost:{web.address[1]}/a") == "web: GET /a\n"
        assert curl(*proxy, f"http://{address_text(web.address)}/b") == "web: GET /b\n"
        # Denied, and nobody there: curl knows it from the proxy's reply.
        curl(*proxy, "http://192.0.2.1/", fails_with=97)
        curl(*proxy, f"http://127.0.0.1:{unused_port()}/", fails_with=97)


def test_curl_through_socks_with_a_password(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    (tmp_path / "alice").write_text("s3cret\n")
    with WebServer("web") as web:
        forwarder = start_forwarder(
            config(
                "{match: socks, allow: [loopback], users: [alice]}",
                more=f"users: {{alice: {tmp_path}/alice}}\n",
            )
        )
        proxy = ["-x", f"socks5h://{at(forwarder)}", f"http://{address_text(web.address)}/"]
        assert curl("-U", "alice:s3cret", *proxy) == "web: GET /\n"
        curl("-U", "alice:secret", *proxy, fails_with=97)
        curl(*proxy, fails_with=97)


def test_curl_through_http_connect(
    tls: ssl.SSLContext, start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    (tmp_path / "alice").write_text("s3cret")
    with WebServer("web") as web, WebServer("tls", context=tls) as secure:
        forwarder = start_forwarder(
            config(
                "{match: http_connect, allow: [loopback], users: [alice]}",
                more=f"users: {{alice: {tmp_path}/alice}}\n",
            )
        )
        proxy = ["-x", f"http://{at(forwarder)}", "-p"]
        good = [*proxy, "-U", "alice:s3cret"]
        assert curl(*good, f"http://{address_text(web.address)}/a") == "web: GET /a\n"
        assert curl(*good, "-k", f"https://localhost:{secure.address[1]}/b") == "tls: GET /b\n"
        code = ["-o", os.devnull, "-w", "%{http_connect}"]
        assert curl(*proxy, *code, "http://127.0.0.1:1/", fails_with=56) == "407"
        assert curl(*good, *code, "http://192.0.2.1/", fails_with=56) == "403"
        assert curl(*good, *code, f"http://127.0.0.1:{unused_port()}/", fails_with=56) == "502"
        assert curl(*good, *code, "http://no.such.name.invalid/", fails_with=56) == "502"


def test_nc_through_socks(start_forwarder: StartForwarder) -> None:
    with NameServer("named") as server:
        forwarder = start_forwarder(config("{match: socks, allow: [loopback]}"))
        host, port = server.address
        assert run("nc", "-X", "5", "-x", at(forwarder), host, str(port)) == "named"


# SSH.


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[tuple[str, int]]:
    with programs.sshd(tmp_path) as address:
        yield address


def test_ssh_beside_others_on_one_port(
    sshd: tuple[str, int], tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    with WebServer("web") as web:
        forwarder = start_forwarder(
            config(f"{{match: ssh, to: '{address_text(sshd)}'}}", rule("http", web))
        )
        assert ssh(tmp_path, port=forwarder.address[1]) == "in\n"
        assert curl(f"http://{at(forwarder)}/") == "web: GET /\n"


def test_ssh_with_our_connect_as_its_proxy_command(
    sshd: tuple[str, int], tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config("{match: instruction, allow: [loopback]}"))
    command = f"{' '.join(COMMAND)} connect %h:%p --via {at(forwarder)}"
    assert ssh(tmp_path, "-o", f"ProxyCommand={command}", port=sshd[1]) == "in\n"
    # ssh kills its proxy command in the end, so how it ends is chance; that it does is not.
    wait_for(lambda: forwarder.show("stats")["closed"], "the end of the pair")
    forwarder.wait_for_no_pairs()


@pytest.mark.parametrize(
    ("match", "version"), [("socks", "4"), ("socks", "5"), ("http_connect", "connect")]
)
def test_ssh_with_nc_as_its_proxy_command(
    match: str,
    version: str,
    sshd: tuple[str, int],
    tmp_path: Path,
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder(config(f"{{match: {match}, allow: [loopback]}}"))
    command = f"nc -X {version} -x {at(forwarder)} %h %p"
    assert ssh(tmp_path, "-o", f"ProxyCommand={command}", port=sshd[1]) == "in\n"
