"""PROXY headers from and to other programs: HAProxy and nginx before us and behind us."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.peers import unused_port
from tests.helpers.programs import WebServer, answering, at, config, curl, haproxy, rule
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder


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


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_haproxy_behind_us_learns_who_the_client_is(
    form: str, tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    port = unused_port()
    with haproxy(tmp_path, port, answering(port)):
        forwarder = start_forwarder(
            config(f"{{match: http, to: '127.0.0.1:{port}', send_proxy: {form}}}")
        )
        local = unused_port()
        answer = curl("--local-port", str(local), f"http://{at(forwarder)}/").split()
        assert answer[:2] == [f"127.0.0.1:{local}", at(forwarder)]
        assert len(answer) == (3 if form == "v2" else 2)


@pytest.mark.parametrize(
    "words", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"]
)
@pytest.mark.parametrize("form", ["v1", "v2"])
def test_haproxy_before_and_behind_us(
    words: str, form: str, tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    front, back = unused_port(), unused_port()
    while back == front:
        back = unused_port()
    forwarder = start_forwarder(
        config(
            f"{{match: {{http: null, client: 127.0.0.9}}, to: '127.0.0.1:{back}',"
            f" send_proxy: {form}}}",
            options="    proxy_protocol: {accept: true, trusted: [127.0.0.1]}\n",
        )
    )
    before = (
        f"listen front\n  bind 127.0.0.1:{front}\n  unique-id-format from-the-front\n"
        f"  server us {at(forwarder)} {words}\n"
    )
    with haproxy(tmp_path, back, answering(back)), haproxy(tmp_path, front, before):
        local = unused_port("127.0.0.9")
        answer = curl(
            "--interface", "127.0.0.9", "--local-port", str(local), f"http://127.0.0.1:{front}/"
        ).split()
        assert answer[:2] == [f"127.0.0.9:{local}", f"127.0.0.1:{front}"]


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
            wait_for(lambda: forwarder.show("listeners")[0]["accepted"] > 5, "checks")
            assert curl(f"http://127.0.0.1:{front}/") == "web: GET /\n"
            # The header of a check is one; none of them was malformed.
            assert "malformed" not in forwarder.show("stats")["closed"]
