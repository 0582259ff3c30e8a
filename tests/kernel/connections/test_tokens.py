"""Signed instructions and users with passwords, as a running forwarder takes them."""

from __future__ import annotations

import base64
import ipaddress
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyforwarder import client
from pyforwarder.core import token
from pyforwarder.core.address import Address
from tests.helpers.instruction import ACK, refusal
from tests.helpers.peers import AnswerServer, address_text, dial, read_exactly, read_to_end

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

pytestmark = pytest.mark.copied

KEY = bytes(range(32))


def signed(
    server: tuple[str, int],
    *,
    lifetime_s: int = 60,
    key: bytes = KEY,
    key_id: str = "ops",
    source: str | None = None,
) -> bytes:
    expires_unix_s = int(time.time()) + lifetime_s  # noqa: TID251 - tokens expire by the wall clock
    return token.make(
        Address(*server),
        expires_unix_s=expires_unix_s,
        key_id=key_id,
        key=key,
        source=ipaddress.ip_network(source) if source else None,
    )


def config(directory: Path, *, single_use: bool = False, workers: int = 3) -> str:
    (directory / "ops.key").write_bytes(KEY)
    return (
        f"workers: {workers}\n"
        "listeners:\n  - name: main\n    bind: 127.0.0.1:0\n"
        "    rules: [{match: instruction, allow: [loopback], token: required}]\n"
        f"tokens: {{keys: {{ops: {directory}/ops.key}}, clock_skew: 0, "
        f"single_use: {str(single_use).lower()}}}\n"
    )


def answer(forwarder: tuple[str, int], instruction: bytes) -> bytes:
    with dial(forwarder) as sock:
        sock.sendall(instruction)
        sock.shutdown(socket.SHUT_WR)
        return read_to_end(sock)


def test_a_signed_instruction_is_good_until_it_expires(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    with AnswerServer("server") as server:
        forwarder = start_forwarder(config(tmp_path))
        good = signed(server.address)
        for _ in range(2):
            with dial(forwarder.address) as sock:
                sock.sendall(good + b"payload")
                assert read_exactly(sock, len(ACK)) == ACK
                assert read_exactly(sock, 18) == b"server got payload"
        for bad in (
            signed(server.address, lifetime_s=-5),
            signed(server.address, key=bytes(32)),
            good.replace(b"exp=1", b"exp=2"),
        ):
            assert answer(forwarder.address, bad) == refusal("token")


def test_a_single_use_token_is_good_once_in_all_workers_and_after_a_reload(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    with AnswerServer("server") as server:
        forwarder = start_forwarder(config(tmp_path, single_use=True))
        once = signed(server.address)
        # Each connection falls to one of three workers by its hash: 23 reach all of them.
        answers = [answer(forwarder.address, once) for _ in range(23)]
        assert answers == [ACK] + [refusal("token")] * 22
        assert forwarder.command("reload").returncode == 0
        assert answer(forwarder.address, once) == refusal("token")
        assert answer(forwarder.address, signed(server.address, lifetime_s=61)) == ACK


def test_keys_are_rotated_by_reload(start_forwarder: StartForwarder, tmp_path: Path) -> None:
    text = config(tmp_path)
    (tmp_path / "new.key").write_bytes(bytes(32))
    both = text.replace("{ops: ", f"{{new: {tmp_path}/new.key, ops: ")
    only_new = text.replace(f"{{ops: {tmp_path}/ops.key}}", f"{{new: {tmp_path}/new.key}}")
    with AnswerServer("server") as server:
        forwarder = start_forwarder(text)

        def answers() -> list[bytes]:
            by_id = {"ops": KEY, "new": bytes(32)}
            return [
                answer(forwarder.address, signed(server.address, key=key, key_id=key_id))
                for key_id, key in by_id.items()
            ]

        assert answers() == [ACK, refusal("token")]
        with dial(forwarder.address) as old:
            old.sendall(signed(server.address))
            assert read_exactly(old, len(ACK)) == ACK
            for changed, expected in (
                (both, [ACK, ACK]),
                (only_new, [refusal("token"), ACK]),
            ):
                forwarder.reconfigure(changed)
                assert forwarder.command("reload").returncode == 0
                assert answers() == expected
            # Another key under the same name counts from the reload on, not before.
            (tmp_path / "new.key").write_bytes(bytes(range(1, 33)))
            assert answers() == [refusal("token"), ACK]
            assert forwarder.command("reload").returncode == 0
            assert answers() == [refusal("token")] * 2
            # What was let in with a key that is gone stays.
            old.sendall(b"payload")
            assert read_exactly(old, 18) == b"server got payload"


def test_a_clock_that_is_behind_is_allowed_for_as_configured(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    text = config(tmp_path).replace("clock_skew: 0", "clock_skew: 1m, max_lifetime: 5m")
    with AnswerServer("server") as server:
        forwarder = start_forwarder(text)
        for lifetime_s, expected in (
            (-30, ACK),
            (-90, refusal("token")),
            (330, ACK),
            (420, refusal("token")),
        ):
            good_for = signed(server.address, lifetime_s=lifetime_s)
            assert answer(forwarder.address, good_for) == expected, lifetime_s


def test_a_token_for_some_clients_means_those_in_the_proxy_header(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    text = config(tmp_path).replace(
        "    rules:", "    proxy_protocol: {accept: true, trusted: [loopback]}\n    rules:"
    )
    with AnswerServer("server") as server:
        forwarder = start_forwarder(text)
        token_ = signed(server.address, source="192.0.2.0/24")
        for client, expected in (("192.0.2.7", ACK), ("198.51.100.7", refusal("token"))):
            header = f"PROXY TCP4 {client} 127.0.0.1 4711 9999\r\n".encode()
            assert answer(forwarder.address, header + token_) == expected


def test_the_commands_sign_what_the_forwarder_takes(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    with AnswerServer("server") as server:
        forwarder = start_forwarder(config(tmp_path))
        to, via = address_text(server.address), address_text(forwarder.address)
        key = f"{tmp_path}/ops.key"
        done = forwarder.command("connect", to, "--via", via, "--key", key, stdin=b"hello")
        assert (done.returncode, done.stdout) == (0, "server got hello")
        done = forwarder.command("connect", to, "--via", via, stdin=b"hello")
        assert (done.returncode, done.stdout) == (1, "")
        assert "token" in done.stderr
        assert forwarder.command("token", "--new", f"{tmp_path}/other.key").returncode == 0
        other = f"ops={tmp_path}/other.key"
        done = forwarder.command("connect", to, "--via", via, "--key", other, stdin=b"hello")
        assert (done.returncode, done.stdout) == (1, "")
        made = forwarder.command("token", to, "--key", key, "--from", "127.0.0.0/8").stdout
        assert answer(forwarder.address, made.encode()) == ACK
        made = forwarder.command("token", to, "--key", key, "--from", "192.0.2.0/24").stdout
        assert answer(forwarder.address, made.encode()) == refusal("token")


def test_http_connect_asks_users_for_their_password(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    (tmp_path / "alice").write_text("open sesame\n")
    with AnswerServer("server") as server:
        forwarder = start_forwarder(
            "listeners:\n  - bind: 127.0.0.1:0\n"
            "    rules: [{match: http_connect, allow: [loopback], users: [alice]}]\n"
            f"users: {{alice: {tmp_path}/alice}}\n"
        )
        request = f"CONNECT {address_text(server.address)} HTTP/1.1\r\n{{}}\r\n"
        assert answer(forwarder.address, request.format("").encode()).startswith(b"HTTP/1.1 407 ")
        for password, status in (("open sesame", b"200"), ("open sesame\n", b"407")):
            said = base64.b64encode(f"alice:{password}".encode()).decode()
            header = f"Proxy-Authorization: Basic {said}\r\n"
            given = answer(forwarder.address, request.format(header).encode())
            assert given.startswith(b"HTTP/1.1 " + status)


def test_clients_that_sign_for_one_destination_in_one_second_are_all_served(
    start_forwarder: StartForwarder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AnswerServer("server") as server:
        forwarder = start_forwarder(config(tmp_path, single_use=True))
        now_ns = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now_ns)
        for _ in range(4):
            connection = client.connect(
                address_text(server.address),
                via=address_text(forwarder.address),
                key=("ops", KEY),
            )
            connection.close()


def test_a_token_that_names_a_gateway_is_used_up_at_that_one_only(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    with AnswerServer("server") as server:
        one, two = (
            start_forwarder(
                config(tmp_path, single_use=True).replace("{keys", f"{{audience: {name}, keys"),
                instance=name,
            )
            for name in ("gate-1", "gate-2")
        )
        unnamed = start_forwarder(config(tmp_path, single_use=True), instance="unnamed")
        to, key = address_text(server.address), f"{tmp_path}/ops.key"
        made = one.command("token", to, "--key", key, "--aud", "gate-1").stdout.encode()
        assert made.count(b" aud=gate-1 ") == 1
        assert answer(two.address, made) == refusal("token")
        assert answer(unnamed.address, made) == refusal("token")
        assert [answer(one.address, made) for _ in range(3)] == [ACK] + [refusal("token")] * 2
        # One that names no gateway could be used at both.
        assert answer(one.address, signed(server.address)) == refusal("token")
        assert answer(unnamed.address, signed(server.address)) == ACK
        via = address_text(two.address)
        connect = ("connect", to, "--via", via, "--key", key)
        done = two.command(*connect, "--aud", "gate-2", stdin=b"hello")
        assert (done.returncode, done.stdout) == (0, "server got hello")
        assert two.command(*connect, "--aud", "gate-1", stdin=b"hello").returncode == 1
        done = two.command("connect", to, "--via", via, "--aud", "gate-2", stdin=b"hello")
        assert (done.returncode, done.stdout) == (2, "")
        assert "a key is missing" in done.stderr
