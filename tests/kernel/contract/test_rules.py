"""Rules that look at the first bytes, and servers that a configuration names."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.first_packets import client_hello
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.netns import blackhole
from tests.helpers.peers import (
    AnswerServer,
    NameServer,
    Server,
    Waiting,
    address_text,
    dial,
    ends_with_reset,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

pytestmark = pytest.mark.copied


def rules_config(*rules: str, more: str = "", timeout: str = "400ms") -> str:
    lines = "".join(f"      - {rule}\n" for rule in rules)
    return (
        "listeners:\n  - name: main\n    bind: 127.0.0.1:0\n"
        f"    first_packet: {{timeout: {timeout}, max_bytes: 1KiB}}\n    rules:\n{lines}{more}"
    )


def rule_to(server: Server | Waiting, match: str) -> str:
    return f"{{match: {match}, to: '{address_text(server.address)}'}}"


def answer_to(forwarder: Daemon, data: bytes) -> bytes:
    """What a client gets that says this."""
    with dial(forwarder.address) as client:
        client.sendall(data)
        return client.recv(100)


@pytest.mark.parametrize(
    "datapath", ["copy", pytest.param("express", marks=pytest.mark.copied(False))]
)
def test_the_first_rule_that_matches_decides(
    start_forwarder: StartForwarder, datapath: str
) -> None:
    """The kernel decides by the first rule if it knows the server by then, a worker else."""
    with (
        AnswerServer("prefix") as first,
        AnswerServer("regex") as second,
        AnswerServer("any") as third,
    ):
        forwarder = start_forwarder(
            rules_config(
                rule_to(first, "{bytes: {prefix: 'hex:0016'}}"),
                rule_to(second, "{regex: '^EHLO '}"),
                "{match: instruction, allow: [loopback]}",
                rule_to(third, "any"),
                more=f"datapath: {datapath}\n",
            )
        )
        for data, name in (
            (b"\0\x16 and more", b"prefix"),
            (b"EHLO example.org", b"regex"),
            (b"something else", b"any"),
            (b"\0\x17", b"any"),
            (b"E", None),  # could still become EHLO: decided by the timeout
        ):
            assert answer_to(forwarder, data) == (name or b"any") + b" got " + data
        with dial(forwarder.address) as client:
            client.sendall(instruction(address_text(first.address)) + b"x")
            assert read_exactly(client, 6) == ACK
            assert client.recv(100) == b"prefix got x"

        def is_decided_in_the_kernel() -> bool:
            assert answer_to(forwarder, b"\0\x16 and more") == b"prefix got \0\x16 and more"
            return bool(forwarder.look("stats")["joined"]["express"])

        if datapath == "express":
            wait_for(is_decided_in_the_kernel, "the kernel has decided")


def test_the_name_in_the_first_packet_is_connected_to_if_it_may(
    start_forwarder: StartForwarder,
) -> None:
    with AnswerServer("named") as server, AnswerServer("rest") as rest:
        port = server.address[1]
        forwarder = start_forwarder(
            rules_config(
                f"{{name: sni, match: tls, to: sni, port: {port}, allow: [127.0.0.0/8, '::1']}}",
                f"{{name: host, match: http, to: host, port: {port}, allow: [10.0.0.0/8]}}",
                rule_to(rest, "any"),
            )
        )
        for data, answer in (
            (client_hello(b"localhost"), b"named got "),
            (client_hello(b"127.0.0.1"), b"named got "),
            (client_hello(None), b"rest got "),
        ):
            with dial(forwarder.address) as client:
                client.sendall(data)
                assert client.recv(100).startswith(answer)
        for data in (
            client_hello(b"192.0.2.7"),  # not allowed
            client_hello(b"nowhere.invalid"),
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            with dial(forwarder.address) as client:
                client.sendall(data)
                assert ends_with_reset(client) == b""


def test_first_bytes_are_forwarded_whole(start_forwarder: StartForwarder) -> None:
    with Waiting() as waiting:
        forwarder = start_forwarder(
            rules_config(
                rule_to(waiting, "{regex: '^EHLO [^\\n]*\\n'}"),
                "{match: any, reject: reset}",
            )
        )
        with dial(forwarder.address) as client:
            for piece in (b"EH", b"LO exam", b"ple.org\r", b"\nMAIL FROM"):
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
            with waiting.accept() as server:
                assert read_to_end(server) == b"EHLO example.org\r\nMAIL FROM"


def test_silence_goes_to_a_server_that_speaks_first(start_forwarder: StartForwarder) -> None:
    with NameServer("220 mail") as mail:
        forwarder = start_forwarder(
            rules_config(
                "{match: instruction, allow: [loopback]}",
                rule_to(mail, "silence"),
                "{match: any, reject: reset}",
            )
        )
        began_s = time.monotonic()
        with dial(forwarder.address) as client:
            assert read_to_end(client) == b"220 mail"
        assert time.monotonic() - began_s >= 0.4


def test_reject_reset_and_reject_close(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(
        rules_config(
            "{match: {bytes: {prefix: 'hex:01'}}, reject: reset}",
            "{match: {bytes: {prefix: 'hex:02'}}, reject: close}",
            "{match: any, reject: reset}",
        )
    )
    with dial(forwarder.address) as client:
        client.sendall(b"\x01")
        assert ends_with_reset(client) == b""
    with dial(forwarder.address) as client:
        client.sendall(b"\x02 and unread bytes" * 50)
        assert client.recv(1) == b""
    refused = {row["rule"]: row["refused"] for row in forwarder.show("rules")}
    assert sum(refused.values()) == 2


def test_need_more_ends_at_max_bytes(start_forwarder: StartForwarder) -> None:
    """A pattern that could still match is no match once max_bytes are there."""
    with AnswerServer("any") as server:
        forwarder = start_forwarder(
            rules_config(
                "{match: {regex: '^x*y'}, reject: reset}",
                rule_to(server, "any"),
                timeout="1h",
            )
        )
        with dial(forwarder.address) as client:
            client.sendall(b"x" * 3000)
            assert read_exactly(client, 8) == b"any got "


def test_a_rule_names_an_ipv6_server(start_forwarder: StartForwarder) -> None:
    with NameServer("six", host="::1") as six:
        forwarder = start_forwarder(rules_config(rule_to(six, "any")))
        assert greeting(forwarder) == b"six"


@pytest.mark.copied(False)  # what is shown is why it must be
def test_a_rule_names_a_unix_socket(start_forwarder: StartForwarder) -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = Path(directory, "server")
        path.parent.chmod(0o755)
        listener.bind(str(path))
        path.chmod(0o777)  # the workers are nobody
        listener.listen()
        listener.settimeout(DEADLINE_S)
        forwarder = start_forwarder(rules_config(f"{{match: any, to: 'unix:{path}'}}"))
        with dial(forwarder.address) as client:
            client.sendall(b"hello")
            server, _ = listener.accept()
            with server:
                server.settimeout(DEADLINE_S)
                assert read_exactly(server, 5) == b"hello"
                row = forwarder.wait_for_pair(lambda row: row["state"] == "joined")
                assert row["server"].startswith("unix:")
                assert row["datapath"] == "copy"
                assert "unix" in row["reason"]
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(server) == b""
                server.sendall(b"from a unix socket")
            assert read_to_end(client) == b"from a unix socket"


def test_a_listener_may_be_a_unix_socket(start_forwarder: StartForwarder) -> None:
    with NameServer("inside") as server, tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory, "listener"))
        config = rules_config(rule_to(server, "any")).replace("127.0.0.1:0", f"unix:{path}", 1)
        forwarder = start_forwarder(config)
        with dial(path) as client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == b"inside"
        assert forwarder.stop() == 0
        assert not Path(path).exists()


# ---------------------------------------------------------------------------- upstreams


def upstream_config(
    *servers: tuple[str, int], balance: str = "round_robin", connect: str = "300ms"
) -> str:
    listed = ", ".join(f"'{address_text(server)}'" for server in servers)
    return rules_config(
        "{match: any, to: pool}",
        more=f"upstreams:\n  pool: {{servers: [{listed}], balance: {balance}, "
        f"connect_timeout: {connect}}}\n",
    )


def greeting(forwarder: Daemon) -> bytes:
    with dial(forwarder.address) as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        return read_to_end(client)


def test_round_robin_takes_the_servers_in_turn(start_forwarder: StartForwarder) -> None:
    with NameServer("a") as a, NameServer("b") as b, NameServer("c") as c:
        forwarder = start_forwarder(
            "workers: 1\n" + upstream_config(a.address, b.address, c.address)
        )
        heard = [greeting(forwarder) for _ in range(9)]
        assert sorted(heard[:3]) == [b"a", b"b", b"c"]
        assert heard == heard[:3] * 3


def test_source_hash_keeps_a_client_with_its_server(start_forwarder: StartForwarder) -> None:
    with NameServer("a") as a, NameServer("b") as b, NameServer("c") as c:
        forwarder = start_forwarder(
            upstream_config(a.address, b.address, c.address, balance="source_hash")
        )
        assert len({greeting(forwarder) for _ in range(7)}) == 1


def test_least_pairs_counts_the_pairs_of_all_workers(start_forwarder: StartForwarder) -> None:
    with Waiting() as first, Waiting() as second, contextlib.ExitStack() as open_sockets:
        one = "workers: 3\n" + upstream_config(first.address, balance="least_pairs")
        both = "workers: 3\n" + upstream_config(
            first.address, second.address, balance="least_pairs"
        )
        forwarder = start_forwarder(one)

        def next_pair(server: Waiting) -> None:
            client = open_sockets.enter_context(dial(forwarder.address))
            served = open_sockets.enter_context(server.accept())
            served.sendall(b"x")
            assert read_exactly(client, 1) == b"x"

        def pairs() -> list[int]:
            return [row["pairs"] for row in forwarder.show("upstreams")]

        for _ in range(23):
            next_pair(first)
        forwarder.reconfigure(both)
        assert forwarder.command("reload").returncode == 0
        # Each connection falls to one of three workers by its hash, and not evenly: a worker that
        # knew its own pairs only would give some of these to the first server.
        for _ in range(23):
            next_pair(second)
        assert pairs() == [23, 23]
        # A worker's pairs go with it, and are counted no more.
        killed = forwarder.workers()[0]
        killed.kill()
        forwarder.wait_for_line("worker_died")
        wait_for(lambda: len(forwarder.workers()) == 3, "a new worker")
        left = pairs()
        assert sum(left) < 46
        for _ in range(abs(left[0] - left[1])):
            next_pair(first if left[0] < left[1] else second)
        assert pairs() == [max(left)] * 2


def test_the_next_server_is_tried_when_one_refuses(start_forwarder: StartForwarder) -> None:
    with NameServer("alive") as alive:
        refusing = ("127.0.0.1", unused_port())
        forwarder = start_forwarder(upstream_config(refusing, alive.address))
        assert [greeting(forwarder) for _ in range(6)] == [b"alive"] * 6
        rows = {row["server"]: row for row in forwarder.show("upstreams")}
        assert rows[address_text(alive.address)]["connects"] == 6
        assert rows[address_text(refusing)]["failures"] >= 1


def test_the_next_server_is_tried_when_one_never_answers(start_forwarder: StartForwarder) -> None:
    with NameServer("alive") as alive, blackhole() as hole:
        forwarder = start_forwarder(upstream_config(hole, alive.address))
        assert [greeting(forwarder) for _ in range(4)] == [b"alive"] * 4


def test_a_client_is_reset_when_no_server_is_left(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(
        upstream_config(("127.0.0.1", unused_port()), ("127.0.0.2", unused_port("127.0.0.2")))
    )
    try:
        with dial(forwarder.address) as client:
            client.sendall(b"hello")
            assert ends_with_reset(client) == b""
    except ConnectionResetError:
        pass  # both servers had refused before a byte was sent, or connect() had returned
    forwarder.wait_for_no_pairs()
    assert forwarder.show("stats")["closed"]["refused"] == 1


# ---------------------------------------------------------------------------- explain


def test_explain_names_the_rule_and_the_destination(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(
        rules_config(
            "{name: named, match: instruction, allow: ['127.0.0.0/8:9000-9100']}",
            "{name: mail, match: {regex: '^EHLO '}, to: '127.0.0.1:25'}",
        )
    )
    for first_bytes, words in (
        (b"18127.0.0.1:900102", ["named", "127.0.0.1:9001", "18"]),
        (b"EHLO example", ["mail", "127.0.0.1:25"]),
        (instruction("10.0.0.1:9001"), ["named", "10.0.0.1:9001", "denied"]),
    ):
        done = forwarder.command(
            "explain", "-c", str(forwarder.config_path), "--hex", first_bytes.hex()
        )
        assert done.returncode == 0, done.stderr
        for word in words:
            assert word in done.stdout
        again = forwarder.command("explain", "--hex", first_bytes.hex(), "--json")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["rule"] == words[0]


@pytest.mark.parametrize("words", [[], ["--hex", "0x"], ["--hex", "abc"]])
def test_explain_without_usable_bytes_is_a_usage_error(
    start_forwarder: StartForwarder, words: list[str]
) -> None:
    forwarder = start_forwarder(rules_config("{match: any, reject: reset}"))
    assert forwarder.command("explain", *words).returncode == 2


def test_the_built_in_configuration(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(None)
    assert forwarder.listeners() == {"main": ("127.0.0.1", 9999)}
    with NameServer("there") as server:
        with dial(forwarder.address) as client:
            client.sendall(instruction(address_text(server.address)))
            assert read_to_end(client) == ACK + b"there"
        with dial(forwarder.address) as client:
            client.sendall(instruction("10.0.0.1:80"))
            assert read_to_end(client) == refusal("denied")


def test_listen_moves_the_first_listener(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(None, "--listen", "127.0.0.2:0")
    assert forwarder.address[0] == "127.0.0.2"
    with NameServer("there") as server, dial(forwarder.address) as client:
        client.sendall(instruction(address_text(server.address)))
        assert read_to_end(client) == ACK + b"there"
