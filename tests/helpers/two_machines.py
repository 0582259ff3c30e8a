"""Two machines of a fleet, whose addresses move from one to the other; a client and a server.

    client c0 --+-- switch `front` --+-- a0 machine a a1 --+-- switch `back` --+-- s0 server
                                     +-- b0 machine b b1 --+
    both machines reach a store by m0, at the switches' host

Each machine has addresses of its own, and one of them has those that move (`FRONT`, `BACK`).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.helpers.lateness import HostLateness
from tests.helpers.netns import Network
from tests.helpers.peers import address_text

FRONT: Final = {4: "10.1.0.1", 6: "fd01::1"}
BACK: Final = {4: "10.2.0.1", 6: "fd02::1"}
SERVER: Final = {4: "10.2.0.100", 6: "fd02::100"}
STORE: Final = "10.3.0.1"
MACHINES: Final = {"a": 11, "b": 12}


@dataclass(frozen=True, slots=True)
class Machines:
    """Where everything is."""

    client: Network
    server: Network
    switch: Network
    machines: dict[str, Network]

    def cut_off(self, name: str) -> None:
        """Nothing comes from this machine any more, nor gets there."""
        self.switch.ip(*(f"link set {name}{n} down" for n in ("f", "b", "m")))

    def connect(self, name: str) -> None:
        """It is there again."""
        self.switch.ip(*(f"link set {name}{n} up" for n in ("f", "b", "m")))

    def give_addresses(self, name: str, sides: Sequence[str] = ("0", "1")) -> None:
        """The addresses that move are this machine's, and it says so to its neighbours.

        Sides are `0`, the clients', and `1`, the server's.
        """
        self.machines[name].ip(
            *(
                f"address add {ip}/{_BITS[v]} dev {name}{side}{_NODAD[v]}"
                for side in sides
                for v, ip in _MOVING[side].items()
            )
        )
        self.announce(name, sides)

    def announce(self, name: str, sides: Sequence[str] = ("0", "1")) -> None:
        """Gratuitous ARP (RFC 5227, 3), unsolicited advertisements (RFC 4861, 7.2.6)."""
        with self.machines[name].entered():
            for side in sides:
                _announce4(f"{name}{side}", _MOVING[side][4])
                _announce6(f"{name}{side}", _MOVING[side][6])

    def take_addresses(self, name: str) -> None:
        """They are this machine's no more."""
        self.machines[name].ip(
            *(f"address del {ip}/{_BITS[v]} dev {name}0" for v, ip in FRONT.items()),
            *(f"address del {ip}/{_BITS[v]} dev {name}1" for v, ip in BACK.items()),
        )


_BITS: Final = {4: 32, 6: 128}
_MOVING: Final = {"0": FRONT, "1": BACK}
_NODAD: Final = {4: "", 6: " nodad"}


@contextlib.contextmanager
def two_machines() -> Iterator[Machines]:
    """The hosts and wires; the addresses that move are nowhere yet."""
    with contextlib.ExitStack() as stack:
        names = ("client", "server", "switch", *MACHINES)
        hosts = {name: stack.enter_context(contextlib.closing(Network())) for name in names}
        switch = hosts["switch"]
        for bridge in ("front", "back", "store"):
            switch.ip(f"link add {bridge} type bridge", f"link set {bridge} up")
        switch.ip(f"address add {STORE}/24 dev store")
        _plug(switch, hosts["client"], "c0", "cf", "front", 1, 100)
        _plug(switch, hosts["server"], "s0", "sb", "back", 2, 100)
        for name, number in MACHINES.items():
            host = hosts[name]
            host.set(ipv4__tcp_no_metrics_save=1)
            _plug(switch, host, f"{name}0", f"{name}f", "front", 1, number)
            _plug(switch, host, f"{name}1", f"{name}b", "back", 2, number)
            _plug(switch, host, f"{name}2", f"{name}m", "store", 3, number)
        yield Machines(
            hosts["client"], hosts["server"], switch, {name: hosts[name] for name in MACHINES}
        )


def _plug(
    switch: Network, host: Network, name: str, port: str, bridge: str, net: int, number: int
) -> None:
    host.ip(f"link add {name} type veth peer name {port} netns {switch.path}")
    switch.ip(f"link set {port} master {bridge}", f"link set {port} up")
    host.ip(
        f"address add 10.{net}.0.{number}/24 dev {name}",
        f"address add fd{net:02}::{number}/64 dev {name} nodad",
        f"link set {name} up",
    )


def _mac(name: str) -> bytes:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((name, 0))
        return bytes(sock.getsockname()[4])


def _announce4(name: str, address: str) -> None:
    mac, ip = _mac(name), socket.inet_aton(address)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((name, 0))
        for operation in (1, 2):
            target = b"\xff" * 6 if operation == 2 else bytes(6)
            head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
            frame = b"\xff" * 6 + mac + b"\x08\x06" + head + mac + ip + target + ip
            sock.send(frame)


def _announce6(name: str, address: str) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sock.bind((address, 0))
        said = bytes([136, 0, 0, 0, 0x20, 0, 0, 0]) + socket.inet_pton(socket.AF_INET6, address)
        said += b"\x02\x01" + _mac(name)
        sock.sendto(said, ("ff02::1", 0, 0, socket.if_nametoindex(name)))


# Traffic

_PATTERN: Final = bytes(range(251)) * 1050
_PERIOD: Final = 251
_TICK_S: Final = 0.02
OFTEN_S: Final = 0.1  # bytes that come so often show a gap


@dataclass(slots=True)
class Stream:
    """One end of a connection: every byte that comes is compared."""

    sock: socket.socket
    number: int
    side: str
    rate: int  # bytes at a time; 0: it is idle
    every: int = 1  # ticks from one time to the next
    sent: int = 0
    got: int = 0
    error: str = ""
    last_s: float = field(default_factory=time.monotonic)
    gap_s: float = 0.0

    def receive(self) -> None:
        """What has come is what the other end sends."""
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            self.error = type(error).__name__
            return
        if not data:
            self.error = "end"
            return
        at = self.got % _PERIOD
        if data != _PATTERN[at : at + len(data)]:
            self.error = f"wrong bytes at {self.got}"
            return
        self.got += len(data)
        now_s = time.monotonic()
        self.gap_s, self.last_s = max(self.gap_s, now_s - self.last_s), now_s

    def send(self, size: int) -> None:
        """As much of it as there is room for."""
        at = self.sent % _PERIOD
        try:
            self.sent += self.sock.send(_PATTERN[at : at + size])
        except BlockingIOError:
            pass
        except OSError as error:
            self.error = type(error).__name__


class Traffic:
    """Both ends of many connections, in a thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self.streams: list[tuple[Stream, Stream]] = []
        self._is_sending = True
        self._is_over = False
        self._host = HostLateness()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(
        self, client: socket.socket, server: socket.socket, rate: int, *, every: int = 1
    ) -> None:
        """From now on bytes go both ways between these two, `rate` every so many ticks."""
        number = len(self.streams)
        pair = (
            Stream(client, number, "client", rate, every),
            Stream(server, number, "server", rate, every),
        )
        with self._lock:
            for stream in pair:
                stream.sock.setblocking(False)
                self._selector.register(stream.sock, selectors.EVENT_READ, stream)
            self.streams.append(pair)

    def mark(self) -> None:
        """Forget the gaps so far."""
        with self._lock:
            self._host.mark()
            for pair in self.streams:
                for stream in pair:
                    stream.gap_s, stream.last_s = 0.0, time.monotonic()

    def poke(self) -> None:
        """Those that are idle say something, too."""
        with self._lock:
            for pair in self.streams:
                for stream in pair:
                    if not stream.error:
                        stream.send(997)

    def pause(self) -> None:
        """Send no more."""
        with self._lock:
            self._is_sending = False

    def go_on(self) -> None:
        """Send again."""
        with self._lock:
            self._is_sending = True

    def is_whole(self) -> bool:
        """Whether all that was sent has come, where there was no error."""
        with self._lock:
            return all(
                one.got == other.sent
                for pair in self.streams
                if not any(stream.error for stream in pair)
                for one, other in (pair, pair[::-1])
            )

    def errors(self) -> list[str]:
        """Of each end that has one."""
        with self._lock:
            return [
                f"{stream.number} {stream.side}: {stream.error}"
                for pair in self.streams
                for stream in pair
                if stream.error
            ]

    def clients(self) -> set[str]:
        """Their addresses, as `show` has them."""
        return {address_text(one.sock.getsockname()[:2]) for one, _ in self.streams}

    def has_come_since(self, since_s: float) -> bool:
        """Whether bytes have come since then, everywhere where they are sent all the time."""
        with self._lock:
            return all(
                stream.last_s > since_s for pair in self.streams for stream in pair if stream.rate
            )

    def longest_gap_s(self) -> float:
        """Without a byte at an end to which bytes are sent every 0.1 s or more often."""
        with self._lock:
            return max(
                (
                    stream.gap_s
                    for pair in self.streams
                    for stream in pair
                    if stream.rate and stream.every * _TICK_S <= OFTEN_S
                ),
                default=0.0,
            )

    def host_late_s(self) -> float:
        """How much later than elsewhere something may be on this host, since `mark`.

        Not what this thread is late with: it has work of its own.
        """
        return self._host.most_s()

    def _run(self) -> None:
        due_s = time.monotonic()
        tick = 0
        while not self._is_over:
            ready = self._selector.select(max(0.0, due_s - time.monotonic()))
            with self._lock:
                for key, _ in ready:
                    key.data.receive()
                    if key.data.error:
                        self._selector.unregister(key.data.sock)
                now_s = time.monotonic()
                if now_s >= due_s:
                    due_s = now_s + _TICK_S
                    tick += 1
                    for pair in self.streams if self._is_sending else ():
                        for stream in pair:
                            is_due = stream.rate and (tick + stream.number) % stream.every == 0
                            if is_due and not stream.error:
                                stream.send(stream.rate)

    def close(self) -> None:
        """End it, and all connections."""
        self._is_over = True
        self._thread.join()
        self._host.close()
        for pair in self.streams:
            for stream in pair:
                stream.sock.close()
        self._selector.close()
