"""Where a client may go: denied unless allowed, in every form of the address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.peers import NameServer, dial, read_to_end

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

pytestmark = pytest.mark.copied

PORTS = range(20_000, 20_004)

CONFIG = """
listeners:
  - name: any
    bind: 0.0.0.0:0
    rules: [{match: instruction, allow: [any]}]
  - name: loopback
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback]}]
  - name: ports
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: ["127.0.0.0/8:20001,20003-20004", "::1"]}]
  - name: private
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [private]}]
  - name: exact
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [169.254.169.254]}]
timeouts: {connect: 500ms}
"""


@pytest.fixture(scope="module")
def forwarder(start_shared_forwarder: StartForwarder) -> Daemon:
    return start_shared_forwarder(CONFIG)


@pytest.fixture(scope="module", autouse=True)
def servers(network: None) -> Iterator[None]:
    """One on each port of each address that a test may reach."""
    del network
    opened = [NameServer("v4", "127.0.0.1", port) for port in PORTS]
    opened += [NameServer("v6", "::1", port) for port in PORTS]
    for server in opened:
        server.__enter__()
    yield
    for server in opened:
        server.__exit__(None, None, None)


def ask(forwarder: Daemon, listener: str, destination: str) -> bytes:
    with dial(("127.0.0.1", forwarder.listeners()[listener][1])) as client:
        client.sendall(instruction(destination))
        return read_to_end(client)


@pytest.mark.parametrize(
    ("listener", "destination", "answer"),
    [
        ("any", "127.0.0.1:20000", b"v4"),
        ("any", "[::1]:20000", b"v6"),
        ("any", "[::ffff:127.0.0.1]:20000", b"v4"),
        ("loopback", "127.0.0.1:20000", b"v4"),
        ("loopback", "[::1]:20000", b"v6"),
        ("loopback", "localhost:20000", b"v4"),
        ("ports", "127.0.0.1:20001", b"v4"),
        ("ports", "127.0.0.1:20003", b"v4"),
        ("ports", "[::1]:20000", b"v6"),
    ],
)
def test_what_is_allowed_is_reached(
    forwarder: Daemon, listener: str, destination: str, answer: bytes
) -> None:
    assert ask(forwarder, listener, destination) == ACK + answer


@pytest.mark.parametrize(
    ("listener", "destination"),
    [
        ("loopback", "10.0.0.1:20000"),
        ("loopback", "[::ffff:10.0.0.1]:20000"),
        ("loopback", "[2001:db8::1]:20000"),
        ("loopback", "0.0.0.0:20000"),
        ("loopback", "[::]:20000"),
        ("ports", "127.0.0.1:20000"),
        ("ports", "127.0.0.1:20002"),
        ("ports", "localhost:20000"),
        ("private", "127.0.0.1:20000"),
        ("private", "8.8.8.8:53"),
        # never, unless named exactly
        ("any", "169.254.169.254:80"),
        ("any", "169.254.1.1:80"),
        ("any", "[::ffff:169.254.169.254]:80"),
        ("any", "[::169.254.169.254]:80"),
        ("any", "[64:ff9b::a9fe:a9fe]:80"),
        ("any", "[2002:a9fe:a9fe::1]:80"),
        ("any", "[fd00:ec2::254]:80"),
        ("any", "[fe80::1]:80"),
        ("any", "0.0.0.0:20000"),
        ("any", "[::]:20000"),
        ("any", "224.0.0.1:80"),
        ("any", "[ff02::1]:80"),
        ("any", "255.255.255.255:80"),
        ("exact", "169.254.1.1:80"),
    ],
)
def test_what_is_not_allowed_is_denied(forwarder: Daemon, listener: str, destination: str) -> None:
    assert ask(forwarder, listener, destination) == refusal("denied")


def test_an_address_named_exactly_is_tried(forwarder: Daemon) -> None:
    assert ask(forwarder, "exact", "169.254.169.254:80") == refusal("unreachable")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.2", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_the_forwarder_never_connects_to_itself(forwarder: Daemon, host: str) -> None:
    for name in ("any", "loopback"):
        port = forwarder.listeners()[name][1]
        if name == "loopback" and host == "127.0.0.2":
            continue  # bound to 127.0.0.1 alone: that address is somebody else's
        assert ask(forwarder, "any", f"{host}:{port}") == refusal("denied"), name


def test_every_address_of_a_name_must_be_allowed(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "127.0.0.1 localhost good.test\n"
        "127.0.0.1 mixed.test\n"
        "2001:db8::1 mixed.test\n"
        "169.254.169.254 metadata.test\n"
    )
    tmp_path.chmod(0o755)
    hosts.chmod(0o644)
    config = CONFIG.replace("name: any", "name: wide").replace("name: loopback", "name: any")
    forwarder = start_forwarder(
        config,
        prefix=(
            "unshare",
            "-m",
            "sh",
            "-c",
            'mount --bind "$0" /etc/hosts && exec "$@"',
            str(hosts),
        ),
    )
    assert ask(forwarder, "any", "good.test:20000") == ACK + b"v4"
    assert ask(forwarder, "any", "mixed.test:20000") == refusal("denied")
    assert ask(forwarder, "wide", "metadata.test:80") == refusal("denied")
