"""HAProxy and nginx before us and behind us: the client's address, and programs that go through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers import programs
from tests.helpers.peers import address_text, unused_port
from tests.helpers.programs import (
    POSTGRES_HOSTS,
    WebServer,
    answering,
    at,
    config,
    curl,
    haproxy,
    nginx,
    nginx_answering,
    psql,
    rule,
    ssh,
)
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

PROXIES = ["haproxy", "nginx"]


def unused_ports(count: int) -> list[int]:
    """Different ports on which nothing listens."""
    found: set[int] = set()
    while len(found) < count:
        found.add(unused_port())
    return sorted(found)


@contextlib.contextmanager
def telling(proxy: str, directory: Path, port: int) -> Iterator[None]:
    """A proxy that wants a PROXY header and answers requests with what it says."""
    if proxy == "haproxy":
        with haproxy(directory, port, answering(port)):
            yield
    else:
        with nginx(directory, port, http=nginx_answering(port)):
            yield


@contextlib.contextmanager
def passing_on(proxy: str, directory: Path, port: int, to: str, form: str) -> Iterator[None]:
    """A proxy that sends everything on, behind a PROXY header."""
    if proxy == "haproxy":
        words = {"v1": "send-proxy", "v2": "send-proxy-v2", "v2-tlvs": TLVS}[form]
        section = (
            f"listen front\n  bind 127.0.0.1:{port}\n  unique-id-format from-the-front\n"
            f"  server us {to} {words}\n"
        )
        with haproxy(directory, port, section):
            yield
    else:
        server = f"server {{ listen 127.0.0.1:{port}; proxy_pass {to}; proxy_protocol on; }}\n"
        with nginx(directory, port, stream=server):
            yield


TLVS = "send-proxy-v2 proxy-v2-options crc32c,unique-id"


def routes(behind: Mapping[str, int]) -> list[str]:
    """A rule for /PROXY-FORM each, to that proxy and in that form."""
    return [
        f"{{match: {{http: {{path: /{proxy}-{form}}}}}, to: '127.0.0.1:{port}',"
        f" send_proxy: {form}}}"
        for proxy, port in behind.items()
        for form in ("v1", "v2")
    ]


def test_proxies_behind_us_learn_the_clients_address(
    tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    behind = dict(zip(PROXIES, unused_ports(2), strict=True))
    forwarder = start_forwarder(config(*routes(behind)))
    with (
        telling("haproxy", tmp_path, behind["haproxy"]),
        telling("nginx", tmp_path, behind["nginx"]),
    ):
        for path in ("haproxy-v1", "haproxy-v2", "nginx-v1", "nginx-v2"):
            local = unused_port()
            answer = curl("--local-port", str(local), f"http://{at(forwarder)}/{path}").split()
            assert answer[:2] == [f"127.0.0.1:{local}", at(forwarder)]
            # Our unique id, where there is one and the proxy can tell of it.
            assert len(answer) == (3 if path == "haproxy-v2" else 2)


def test_between_proxies_the_first_client_is_told(
    tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    fronts = [("haproxy", "v1"), ("haproxy", "v2"), ("haproxy", "v2-tlvs"), ("nginx", "v1")]
    ports = unused_ports(len(PROXIES) + len(fronts))
    behind = dict(zip(PROXIES, ports, strict=False))
    forwarder = start_forwarder(
        config(
            "{match: {not: {client: 127.0.0.9}}, reject: reset}",
            *routes(behind),
            options="    proxy_protocol: {accept: true, trusted: [127.0.0.1]}\n",
        )
    )
    with (
        telling("haproxy", tmp_path, behind["haproxy"]),
        telling("nginx", tmp_path, behind["nginx"]),
    ):
        for (front, form), port in zip(fronts, ports[len(PROXIES) :], strict=True):
            with passing_on(front, tmp_path, port, at(forwarder), form):
                for path in ("haproxy-v1", "haproxy-v2", "nginx-v1", "nginx-v2"):
                    local = unused_port("127.0.0.9")
                    answer = curl(
                        "--interface", "127.0.0.9", "--local-port", str(local),
                        f"http://127.0.0.1:{port}/{path}",
                    ).split()  # fmt: skip
                    told = [f"127.0.0.9:{local}", f"127.0.0.1:{port}"]
                    assert answer[:2] == told, (front, form, path)


def test_haproxys_own_checks_find_us_up(tmp_path: Path, start_forwarder: StartForwarder) -> None:
    front = unused_port()
    with WebServer("web") as web:
        forwarder = start_forwarder(
            config(
                rule("http", web),
                options="    proxy_protocol: {accept: true, trusted: [loopback]}\n",
            )
        )
        with haproxy(
            tmp_path,
            front,
            f"listen front\n  bind 127.0.0.1:{front}\n"
            f"  server us {at(forwarder)} send-proxy-v2 check inter 100ms rise 1 fall 1\n",
        ):
            wait_for(lambda: forwarder.look("listeners")[0]["accepted"] > 5, "checks")
            assert curl(f"http://127.0.0.1:{front}/") == "web: GET /\n"
            # The header of a check is one; none of them was malformed.
            assert "malformed" not in forwarder.show("stats")["closed"]


def test_curl_sends_a_proxy_header(start_forwarder: StartForwarder) -> None:
    with WebServer("web") as web:
        forwarder = start_forwarder(
            config(
                rule("{client: 127.0.0.1, http: {host: '127.0.0.1'}}", web),
                options="    proxy_protocol: {accept: true, trusted: [loopback]}\n",
            )
        )
        assert curl("--haproxy-protocol", f"http://{at(forwarder)}/a") == "web: GET /a\n"
        curl(f"http://{at(forwarder)}/a", fails_with=56)


# One port, three protocols, and real programs at both ends, with a proxy on either side of us.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs.make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def postgres(network: None, certificate: Path) -> Iterator[int]:
    del network
    with programs.postgres(certificate) as port:
        yield port


@contextlib.contextmanager
def unwrapping(
    proxy: str, directory: Path, ports: Sequence[int], sshd: str, postgres: str, certificate: Path
) -> Iterator[None]:
    """A proxy behind us that takes PROXY headers off.

    What comes to the first of its ports it passes on to `sshd`, to the second to `postgres`; on the
    third it speaks TLS itself, and answers with the name it was asked for.
    """
    for_ssh, for_postgres, for_tls = (f"127.0.0.1:{port}" for port in ports)
    if proxy == "haproxy":
        sections = (
            f"listen ssh\n  bind {for_ssh} accept-proxy\n  server s {sshd}\n"
            f"listen postgres\n  bind {for_postgres} accept-proxy\n  server s {postgres}\n"
            f"frontend web\n  mode http\n  bind {for_tls} accept-proxy ssl crt {certificate}\n"
            '  http-request return status 200 content-type text/plain lf-string "%[ssl_fc_sni]"\n'
        )
        with haproxy(directory, ports[0], sections):
            yield
    else:
        stream = (
            f"server {{ listen {for_ssh} proxy_protocol; proxy_pass {sshd}; }}\n"
            f"server {{ listen {for_postgres} proxy_protocol; proxy_pass {postgres}; }}\n"
        )
        http = (
            f"server {{ listen {for_tls} ssl proxy_protocol; ssl_certificate {certificate};"
            f' ssl_certificate_key {certificate}; return 200 "$ssl_server_name"; }}\n'
        )
        with nginx(directory, ports[0], stream=stream, http=http):
            yield


@pytest.mark.parametrize("back", PROXIES)
@pytest.mark.parametrize("front", PROXIES)
def test_ssh_psql_and_curl_through_a_chain_of_proxies(
    front: str,
    back: str,
    postgres: int,
    certificate: Path,
    tmp_path: Path,
    start_forwarder: StartForwarder,
) -> None:
    before, *behind = unused_ports(4)
    for_ssh, for_postgres, for_tls = (f"127.0.0.1:{port}" for port in behind)
    forwarder = start_forwarder(
        config(
            f"{{match: ssh, to: '{for_ssh}', send_proxy: v2}}",
            f"{{match: {{tls: {{sni: www.example}}}}, to: '{for_tls}', send_proxy: v2}}",
            f"{{match: postgres, to: '{for_postgres}', send_proxy: v1}}",
            options="    proxy_protocol: {accept: true, trusted: [loopback]}\n",
        )
    )
    with (
        programs.sshd(tmp_path) as sshd,
        unwrapping(
            back, tmp_path, behind, address_text(sshd),
            f"{POSTGRES_HOSTS[0]}:{postgres}", certificate,
        ),
        passing_on(front, tmp_path, before, at(forwarder), "v1"),
    ):  # fmt: skip
        assert ssh(tmp_path, port=before) == "in\n"
        options = {"sslmode": "require", "channel_binding": "require"}
        query = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
        assert psql(("127.0.0.1", before), query, **options) == "t\n"
        to = ["--connect-to", f"::127.0.0.1:{before}"]
        assert curl("-k", *to, "https://www.example/") == "www.example"
        # Each of the three was taken by its rule, and nothing else came.
        assert [row["taken"] for row in forwarder.show("rules")] == [1, 1, 1]
