"""An afternoon with pyforwarder: what README promises, done with the commands that it names.

Short, and one daemon for most of it, because scripts/kernels runs it in an emulated machine for
every kernel. The details are in the modules about each part.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import pty
import select
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import COMMAND, Daemon, run_command
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import (
    EchoServer,
    address_text,
    dial,
    ends_with_reset,
    pair_through,
    pattern,
    read_exactly,
    unused_port,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Place
    from tests.kernel.conftest import StartForwarder

PAGE: Final = pattern(3_000_000)


class Page(http.server.BaseHTTPRequestHandler):
    """A web server with one page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def web_server() -> Iterator[tuple[str, int]]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield ("127.0.0.1", server.server_port)
        finally:
            server.shutdown()
            thread.join(timeout=DEADLINE_S)


def config(web: tuple[str, int] = ("127.0.0.1", 9), *, metrics: int = 0) -> str:
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules:
      - {{name: named, match: instruction, allow: [loopback]}}
      - {{name: web, match: {{http: {{host: [site.test]}}}}, to: "{address_text(web)}"}}
handover: {{after_bytes: 0B}}
""" + (f"metrics: {{bind: 127.0.0.1:{metrics}}}\n" if metrics else "")


@pytest.fixture(scope="module")
def web(network: None) -> Iterator[tuple[str, int]]:
    del network
    with web_server() as address:
        yield address


@pytest.fixture(scope="module")
def metrics_port(network: None) -> int:
    del network
    return unused_port()


@pytest.fixture(scope="module")
def forwarder(
    start_shared_forwarder: StartForwarder, web: tuple[str, int], metrics_port: int
) -> Daemon:
    return start_shared_forwarder(config(web, metrics=metrics_port))


@pytest.fixture(scope="module")
def best() -> str:
    """The datapath that `auto` takes here, as `doctor --json` says before anybody is connected."""
    ended = subprocess.run(
        [*COMMAND, "doctor", "--json"], capture_output=True, timeout=scaled_s(60), check=False
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)["auto"]
    assert said in {"copy", "sockmap", "splice"}
    return str(said)


def done(forwarder: Daemon, *words: str, stdin: bytes | None = None) -> str:
    """What a command prints that must succeed."""
    ended = forwarder.command(*words, stdin=stdin)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def proc(forwarder: Daemon, name: str) -> Path:
    return forwarder.place.run_dir / forwarder.instance / "proc" / name


def test_check_accepts_what_up_is_given(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(config())
    assert run_command(place, "check", str(path)).returncode == 0
    path.write_text("listeners: 5\n")
    ended = run_command(place, "check", str(path))
    assert ended.returncode == 2
    assert "listeners" in ended.stderr


def test_connect_carries_what_it_is_given_there_and_back(forwarder: Daemon) -> None:
    with EchoServer() as server:
        ended = subprocess.run(
            [
                *COMMAND,
                "connect",
                address_text(server.address),
                "--via",
                address_text(forwarder.address),
            ],
            input=b"one\ntwo\n",
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert (ended.returncode, ended.stdout) == (0, b"one\ntwo\n"), ended.stderr


def test_a_page_is_fetched_by_the_name_of_its_host(forwarder: Daemon) -> None:
    host, port = forwarder.address
    request = urllib.request.Request(f"http://{host}:{port}/", headers={"Host": "site.test"})
    with urllib.request.urlopen(request, timeout=scaled_s(30)) as answer:
        body = answer.read()
    assert hashlib.sha256(body).digest() == hashlib.sha256(PAGE).digest()


def test_a_held_connection_is_shown_everywhere_and_can_be_flushed(
    forwarder: Daemon, best: str
) -> None:
    with pair_through(forwarder.address) as (client, server):
        there_and_back(client, server, pattern(50_000))
        row = forwarder.wait_for_pair(
            lambda row: row["state"] == "joined" and row["datapath"] == best,
            f"a pair joined on {best}",
        )
        wait_for(lambda: forwarder.look()[0]["up_bytes"] == 50_000, "its bytes are counted")
        lines = done(forwarder, "show").splitlines()
        assert lines[0].split()[:3] == ["ID", "STATE", "DATAPATH"]
        assert lines[1].split()[:3] == [str(row["id"]), "joined", best]
        file_lines = proc(forwarder, "show").read_text().splitlines()
        assert file_lines[1].split()[:3] == [str(row["id"]), "joined", best]
        (listener,) = forwarder.show("listeners")
        assert listener["name"] == "main"
        assert "named" in done(forwarder, "show", "rules")

        proc(forwarder, "flush").write_text(f"{row['id']}\n")
        assert ends_with_reset(client) == b""
    forwarder.wait_for_no_pairs()
    assert forwarder.show("stats")["closed"]["flushed"] >= 1


def test_the_first_listener_moves_where_listen_port_says(forwarder: Daemon) -> None:
    host, before = forwarder.address
    port = unused_port()
    proc(forwarder, "listen_port").write_text(f"{port}\n")
    wait_for(
        lambda: proc(forwarder, "listen_port").read_text().strip() == str(port), "the new port"
    )
    with EchoServer() as server, dial((host, port)) as client:
        client.sendall(instruction(address_text(server.address)) + b"hello")
        assert read_exactly(client, len(ACK) + 5) == ACK + b"hello"
    proc(forwarder, "listen_port").write_text(f"{before}\n")
    wait_for(
        lambda: proc(forwarder, "listen_port").read_text().strip() == str(before), "the old port"
    )
    wait_for(lambda: forwarder.address == (host, before), "the line that tells of it")


def test_top_draws_the_pairs(forwarder: Daemon) -> None:
    with pair_through(forwarder.address):
        row = forwarder.wait_for_pair(lambda row: row["state"] == "joined")
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(
                COMMAND[0],
                [COMMAND[0], "top", "--instance", forwarder.instance],
                {**forwarder.place.environ(), "TERM": "xterm", "COLUMNS": "140", "LINES": "24"},
            )
        drawn = b""
        end_s = time.monotonic() + DEADLINE_S
        while str(row["client"]).encode() not in drawn:
            assert select.select([terminal], [], [], end_s - time.monotonic())[0], drawn
            drawn += os.read(terminal, 65536)
        os.write(terminal, b"q")
        with contextlib.suppress(OSError):  # EIO: the other end of the terminal is closed
            while os.read(terminal, 65536):
                pass
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_reload_reads_the_file_again(forwarder: Daemon, web: tuple[str, int]) -> None:
    assert forwarder.config_path is not None
    before = forwarder.config_path.read_text()
    forwarder.reconfigure(before.replace("name: named", "name: renamed"))
    done(forwarder, "reload")
    assert "renamed" in done(forwarder, "show", "rules")
    forwarder.reconfigure("listeners: 5\n")
    assert forwarder.command("reload").returncode != 0
    assert "renamed" in done(forwarder, "show", "rules")
    forwarder.reconfigure(before)
    done(forwarder, "reload")


def test_metrics_are_scraped(forwarder: Daemon, metrics_port: int, best: str) -> None:
    url = f"http://127.0.0.1:{metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=scaled_s(10)) as answer:
        lines = answer.read().decode().splitlines()
    assert f'pyforwarder_datapath_available{{datapath="{best}"}} 1.0' in lines
    (accepted,) = (line for line in lines if line.startswith("pyforwarder_connections_accepted_"))
    assert float(accepted.split()[-1]) >= 1


def test_after_kill_9_the_next_up_serves_and_down_leaves_nothing(
    start_forwarder: StartForwarder, best: str
) -> None:
    first = start_forwarder(config())
    with pair_through(first.address) as (client, server):
        there_and_back(client, server, b"before")
        first.wait_for_pair(lambda row: row["state"] == "joined" and row["datapath"] == best)
        first.kill()
        if best == "splice":  # the kernel alone carries it
            there_and_back(client, server, b"orphaned")
        else:
            assert ends_with_reset(client) == b""
        second = start_forwarder(config())
        if best == "splice":  # and the next daemon shows it again
            there_and_back(client, server, b"adopted")
            second.wait_for_pair(lambda row: row["datapath"] == "splice")
        with pair_through(second.address) as (another, its_server):
            there_and_back(another, its_server, b"again")
    # `start_forwarder` ends it with `down`, and looks for what it left.


def there_and_back(client: socket.socket, server: socket.socket, data: bytes) -> None:
    client.sendall(data)
    assert read_exactly(server, len(data)) == data
    server.sendall(data)
    assert read_exactly(client, len(data)) == data
