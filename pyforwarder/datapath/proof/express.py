"""The self-test of connections that the kernel opens by itself: real clients and servers on `lo`.

A listener and a server are ordinary sockets. A client that the programs take never reaches the
listener; one that they leave alone does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.core.address import Address
from pyforwarder.core.express.table import Clause, Table
from pyforwarder.datapath.express.sharing import Decided, Label
from pyforwarder.datapath.proof.rig import DEADLINE_S, Peer, Reader, RigError, send_all
from pyforwarder.datapath.splice.interfaces import LOOPBACK, mtu_of
from pyforwarder.datapath.splice.sockets import HEADERS_BYTES
from pyforwarder.runtime.linger import reset_at_close
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.splicing import Splicing

_ANY: Final = Table((), (Clause(0, 0, 0),), rules=1, targets=frozenset({0}), most_bytes=4096)
_LABEL: Final = Label("self-test", ("any",), (0, 0, 0))
# The kernel gives a client that has said nothing for a second to the listener: a busy host may need
# more than one.
_TRIES: Final = 10
_BULK_BYTES: Final = 1 << 20
_HELLO: Final = b"hello"
_CARRIED: Final = 6  # where the keeper says that of an end


class Stage:
    """A listener and a server at addresses of `lo`."""

    def __init__(self, splicing: Splicing, host: str) -> None:
        """On this address, with free ports; `close` ends it."""
        assert splicing.express is not None
        self.splicing, self.express = splicing, splicing.express
        self._opened = contextlib.ExitStack()
        self.listener = self._listen(host)
        self.server = self._listen(host)
        headers = HEADERS_BYTES[6 if ":" in host else 4]
        self._decided = Decided(
            _LABEL,
            _ANY,
            {0: Address(host, self.server.getsockname()[1])},
            {
                Address(host, self.listener.getsockname()[1]): min(mtu_of(LOOPBACK), 0xFFFF)
                - headers
            },
            os.geteuid(),
        )

    def _listen(self, host: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = self._opened.enter_context(socket.socket(family))
        sock.bind((host, 0))
        sock.listen(16)
        sock.settimeout(scaled_s(DEADLINE_S))
        return sock

    def dial(self) -> socket.socket:
        """A client; the caller closes it."""
        name = self.listener.getsockname()[:2]
        return socket.create_connection(name, timeout=scaled_s(DEADLINE_S))

    def left_alone(self) -> None:
        """A client whose rules lead nowhere yet reaches the listener, which shows the way."""
        self.express.put([self._decided])
        with self.dial() as client:
            client.sendall(_HELLO)
            answer = self._show_way()
        if not answer.get("learned"):
            raise RigError(f"the way to a server was not learned: {answer}")

    def _show_way(self) -> dict[str, Any]:
        """Accept a client as a worker does, connect, and let the keeper look; its answer."""
        accepted, _ = self.listener.accept()
        target = self.server.getsockname()[:2]
        with accepted, socket.create_connection(target) as outgoing:
            served, _ = self.server.accept()
            with served:
                _expect(accepted, _HELLO)
                sockets = [accepted.fileno(), outgoing.fileno()]
                return self.splicing.patient_client(0).ask("learn", sockets, has_source=0)

    def taken(self) -> tuple[socket.socket, socket.socket]:
        """Client and server of a connection that the kernel has opened."""
        for _ in range(_TRIES):
            client = self.dial()
            client.sendall(_HELLO)
            ready, _, _ = select.select([self.listener, self.server], [], [], scaled_s(DEADLINE_S))
            if self.server in ready:
                served, peer = self.server.accept()
                served.settimeout(scaled_s(DEADLINE_S))
                first = self.express.connections.first_port
                if peer[1] not in range(first, first + self.express.connections.places):
                    raise RigError("the server was asked from a port that is not kept for it")
                _expect(served, _HELLO)
                return client, served
            if self.listener in ready:
                # Ways are forgotten when addresses or routes change, as while a host starts.
                self._show_way()
            client.close()
        raise RigError("the kernel opened nothing")

    def told(self) -> Iterator[list[int]]:
        """What each connection that has ended has carried, as the keeper says it."""
        sock = self.express.workers[0]
        until_s = time.monotonic() + scaled_s(DEADLINE_S)
        while (left_s := until_s - time.monotonic()) > 0:
            if select.select([sock], [], [], left_s)[0]:
                for one in json.loads(sock.recv(1 << 16))["ended"]:
                    yield one[_CARRIED]
        raise RigError("the keeper has told of no end")

    def close(self) -> None:
        """Decide nothing more, and close listener and server."""
        self.express.put(())
        self._opened.close()


def _expect(sock: socket.socket, wanted: bytes) -> None:
    found = b""
    sock.settimeout(scaled_s(DEADLINE_S))
    while len(found) < len(wanted) and (more := sock.recv(len(wanted) - len(found))):
        found += more
    if found != wanted:
        raise RigError(f"{found!r} instead of {wanted!r}")


def _both_ways(stage: Stage) -> None:
    """Bytes and ends in both directions, and what is told of them."""
    client, served = stage.taken()
    with client, served:
        data = bytes(range(256)) * (_BULK_BYTES // 256)
        peers: list[Peer] = []
        readers = []
        for seed, (one, other) in enumerate(((client, served), (served, client))):
            readers.append(Reader("reader", other))
            send = partial(send_all, one, data, seed=seed, then_close=True)
            peers.append(Peer("writer", send))
        for peer in (*peers, *readers):
            peer.join(scaled_s(DEADLINE_S))
            if peer.is_alive() or peer.error is not None:
                raise RigError(f"{peer.name}: {peer.error or 'it waits still'}")
        for reader in readers:
            if bytes(reader.data) != data or reader.ended != "eof":
                raise RigError(f"{len(reader.data)} bytes, then {reader.ended}")
    for carried in stage.told():
        if (carried[0], carried[2]) == (len(_HELLO) + len(data), len(data)):
            return


def _reset(stage: Stage) -> None:
    """A reset goes to the other end, from both."""
    for who in (0, 1):
        ends = stage.taken()
        with ends[0], ends[1]:
            reset_at_close(ends[who].fileno())
            ends[who].close()
            try:
                found = ends[1 - who].recv(1)
            except ConnectionResetError:
                continue
            raise RigError(f"{found!r} instead of a reset")


def _refused(stage: Stage) -> None:
    """A server that refuses: the listener gets the client, with its first bytes."""
    stage.server.close()
    with stage.dial() as client:
        client.sendall(_HELLO)
        accepted, _ = stage.listener.accept()
        with accepted:
            _expect(accepted, _HELLO)
            accepted.sendall(_HELLO)
            _expect(client, _HELLO)


_PLAYS: Final = {
    "a server that is not known yet": Stage.left_alone,
    "bytes and ends both ways": _both_ways,
    "resets": _reset,
    "a server that refuses": _refused,
}


def play(splicing: Splicing) -> dict[str, float]:
    """Play all, for both versions of IP that `lo` has; seconds of each that passed.

    Raises:
        RigError: one has failed.
        OSError: or could not be played.
    """
    passed: dict[str, float] = {}
    for host in ("127.0.0.1", "::1"):
        try:
            stage = Stage(splicing, host)
        except OSError:
            if host == "::1":
                continue  # this host has no IPv6
            raise
        with contextlib.closing(stage):
            for name, one in _PLAYS.items():
                before_s = time.monotonic()
                try:
                    one(stage)
                except (RigError, OSError) as error:
                    raise RigError(f"{name}, {host}: {error}") from error
                passed[f"{name}, {host}"] = round(time.monotonic() - before_s, 3)
    return passed
