"""Programs that people use, through rules that were written for them."""

from __future__ import annotations

import functools
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import programs
from tests.helpers.daemon import COMMAND
from tests.helpers.peers import NameServer, Server, address_text, unused_port
from tests.helpers.programs import (
    POSTGRES_HOSTS,
    WebServer,
    at,
    config,
    curl,
    psql,
    psql_command,
    rule,
    run,
    ssh,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs.make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    return programs.server_context(certificate)


@pytest.fixture(scope="module")
def proxy_of(start_shared_forwarder: StartForwarder) -> Callable[[str], Daemon]:
    """The daemon whose one rule lets clients of that protocol name a server of this host."""
    return functools.cache(
        lambda match: start_shared_forwarder(
            config(f"{{match: {match}, allow: [loopback]}}"), instance=match.replace("_", "-")
        )
    )


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
def test_curl_through_socks(scheme: str, proxy_of: Callable[[str], Daemon]) -> None:
    with WebServer("web") as web:
        proxy = ["-x", f"{scheme}://{at(proxy_of('socks'))}"]
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


@pytest.mark.parametrize(
    ("match", "command"),
    [
        ("socks", "nc -X 4 -x {proxy} {to}"),
        ("socks", "nc -X 5 -x {proxy} {to}"),
        ("http_connect", "nc -X connect -x {proxy} {to}"),
        ("socks", "ncat --proxy {proxy} --proxy-type socks4 {to}"),
        ("socks", "ncat --proxy {proxy} --proxy-type socks5 {to}"),
        ("socks", "ncat --proxy {proxy} --proxy-type socks5 --proxy-dns remote {to}"),
        ("http_connect", "ncat --proxy {proxy} --proxy-type http {to}"),
    ],
)
def test_nc_and_ncat_through_a_proxy(
    match: str, command: str, proxy_of: Callable[[str], Daemon]
) -> None:
    forwarder = proxy_of(match)
    before = forwarder.look("stats")["closed"].get("denied", 0)
    with NameServer("named") as server:
        host, port = server.address
        words = command.format(proxy=at(forwarder), to=f"{host} {port}")
        assert run(*words.split()) == "named"
        denied = command.format(proxy=at(forwarder), to="192.0.2.1 22")
        run(*denied.split(), fails_with=1)
        wait_for(
            lambda: forwarder.look("stats")["closed"].get("denied", 0) == before + 1,
            "it is counted",
        )


@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_ncat_with_a_password(scheme: str, start_forwarder: StartForwarder, tmp_path: Path) -> None:
    (tmp_path / "alice").write_text("s3cret\n")
    match = {"socks5": "socks", "http": "http_connect"}[scheme]
    with NameServer("named") as server:
        forwarder = start_forwarder(
            config(
                f"{{match: {match}, allow: [loopback], users: [alice]}}",
                more=f"users: {{alice: {tmp_path}/alice}}\n",
            )
        )
        host, port = server.address
        proxy = ["ncat", "--proxy", at(forwarder), "--proxy-type", scheme]
        assert run(*proxy, "--proxy-auth", "alice:s3cret", host, str(port)) == "named"
        run(*proxy, "--proxy-auth", "alice:secret", host, str(port), fails_with=1)
        run(*proxy, host, str(port), fails_with=1)


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
    wait_for(lambda: forwarder.look("stats")["closed"], "the end of the pair")
    forwarder.wait_for_no_pairs()


@pytest.mark.parametrize(
    ("match", "command"),
    [
        ("socks", "nc -X 4 -x {proxy} %h %p"),
        ("socks", "nc -X 5 -x {proxy} %h %p"),
        ("http_connect", "nc -X connect -x {proxy} %h %p"),
        ("socks", "ncat --proxy {proxy} --proxy-type socks5 %h %p"),
    ],
)
def test_ssh_with_nc_or_ncat_as_its_proxy_command(
    match: str,
    command: str,
    sshd: tuple[str, int],
    tmp_path: Path,
    proxy_of: Callable[[str], Daemon],
) -> None:
    option = f"ProxyCommand={command.format(proxy=at(proxy_of(match)))}"
    assert ssh(tmp_path, "-o", option, port=sshd[1]) == "in\n"


# PostgreSQL: the client says who it is only after it has been answered about encryption.


@pytest.fixture(scope="module")
def postgres(network: None, certificate: Path) -> Iterator[int]:
    del network
    with programs.postgres(certificate) as port:
        yield port


def postgres_rule(match: str, host: str, port: int) -> str:
    return f"{{match: {match}, to: '{host}:{port}'}}"


WHERE = "select host(inet_server_addr()) || ' ' || current_database() || ' ' || current_user"
ENCRYPTED = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"


def test_psql_gets_to_the_server_of_its_database(
    postgres: int, start_forwarder: StartForwarder
) -> None:
    one, two = POSTGRES_HOSTS
    forwarder = start_forwarder(
        config(
            postgres_rule("{postgres: {user: app, database: ['app_*']}}", one, postgres),
            postgres_rule("{postgres: {user: '*'}}", two, postgres),
            "{match: any, reject: reset}",
        )
    )
    for dbname, host in (("app_live", one), ("other", two)):
        for sslmode in ("disable", "allow", "prefer"):
            options = {"dbname": dbname, "sslmode": sslmode}
            answer = psql(forwarder.address, WHERE, **options)
            assert answer == f"{host} {dbname} app\n", options
            assert psql(forwarder.address, ENCRYPTED, **options) == "f\n"
    refused = psql_command(forwarder.address, WHERE, sslmode="require")
    run(*refused, fails_with=2)
    # What came before the decision is in order with what comes after it, in bulk too.
    much = "copy (select generate_series(1, 400000)) to stdout"
    assert psql(forwarder.address, much) == "".join(f"{n}\n" for n in range(1, 400_001))


def test_psql_encrypts_where_no_condition_asks_for_its_user(
    postgres: int, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(
        config(
            postgres_rule("postgres", POSTGRES_HOSTS[0], postgres), "{match: any, reject: reset}"
        )
    )
    # scram-sha-256-plus binds the password to this very TLS connection: nobody is in between.
    options = {"sslmode": "require", "channel_binding": "require"}
    assert psql(forwarder.address, ENCRYPTED, **options) == "t\n"
    assert psql(forwarder.address, ENCRYPTED, sslmode="disable") == "f\n"


def test_psql_cancels_its_query(postgres: int, start_forwarder: StartForwarder) -> None:
    # A request to cancel comes on a connection of its own and names nobody: a rule without
    # conditions takes it.
    forwarder = start_forwarder(
        config(
            postgres_rule("{postgres: {database: app_live}}", POSTGRES_HOSTS[0], postgres),
            postgres_rule("postgres", POSTGRES_HOSTS[0], postgres),
        )
    )
    sleeps = "select count(*) from pg_stat_activity where query = 'select pg_sleep(99)'"
    sleeping = subprocess.Popen(
        psql_command(forwarder.address, "select pg_sleep(99)"), stderr=subprocess.PIPE
    )
    wait_for(lambda: psql((POSTGRES_HOSTS[1], postgres), sleeps) == "1\n", "the query")
    sleeping.send_signal(signal.SIGINT)
    _, said = sleeping.communicate(timeout=DEADLINE_S)
    assert b"canceling statement due to user request" in said
    assert [row["taken"] for row in forwarder.show("rules")] == [1, 1]


# The server speaks first.


class MailServer(Server):
    """Takes one mail, and keeps its text."""

    text = b""

    def serve(self, sock: socket.socket) -> None:
        with sock.makefile("rwb", buffering=0) as stream:
            stream.write(b"220 mail.example\r\n")
            for answer in (b"250 hello", b"250 ok", b"250 ok", b"354 go on"):
                stream.readline()
                stream.write(answer + b"\r\n")
            while (line := stream.readline()) != b".\r\n":
                assert line
                self.text += line
            stream.write(b"250 taken\r\n")
            stream.readline()
            stream.write(b"221 bye\r\n")


def test_curl_sends_a_mail_through_the_rule_for_silence(start_forwarder: StartForwarder) -> None:
    with MailServer("mail") as mail, WebServer("web") as web:
        rules = [rule("http", web), rule("smtp", mail)]
        forwarder = start_forwarder(config(*rules, first_packet_s=scaled_s(2)))
        curl(
            f"smtp://{at(forwarder)}", "--mail-from", "a@a.example", "--mail-rcpt", "b@b.example",
            "-T", "-", stdin="hello\r\n"
        )  # fmt: skip
        assert mail.text == b"hello\r\n"
        assert curl(f"http://{at(forwarder)}/") == "web: GET /\n"
