"""Machines of a fleet with limits on clients, and a client that connects to all of them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.peers import SilentServer, address_text, read_exactly, reset
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.helpers.etcd import Etcd
    from tests.kernel.conftest import StartForwarder

# Loopback addresses are others at each machine, and count at none but their own.
CLIENT: Final = "192.0.2.61"
OTHER_CLIENT: Final = "192.0.2.62"


@contextlib.contextmanager
def client_addresses() -> Iterator[None]:
    """This host has the clients' addresses."""
    for host in (CLIENT, OTHER_CLIENT):
        subprocess.run(["ip", "address", "add", f"{host}/32", "dev", "lo"], check=True)
    try:
        yield
    finally:
        for host in (CLIENT, OTHER_CLIENT):
            subprocess.run(["ip", "address", "del", f"{host}/32", "dev", "lo"], check=True)


class Machines:
    """Daemons with a limit, and what clients have opened at each."""

    def __init__(
        self, start: StartForwarder, etcd: Etcd, most: int, *, scope: str = "fleet"
    ) -> None:
        """`most` is how many pairs, or sessions, a client may have."""
        self._start, self._etcd, self._most, self._scope = start, etcd, most, scope
        self._stack = contextlib.ExitStack()
        self._server = self._stack.enter_context(SilentServer())
        self.daemons: dict[str, Daemon] = {}
        self.opened: dict[str, list[socket.socket]] = {}

    def config(self, name: str) -> str:
        """Of one machine."""
        return (
            f"fleet: {{endpoints: ['{self._etcd.endpoint}'], name: edge, instance: {name}, "
            f"limits: {{scope: {self._scope}}}}}\n"
            f"workers: 2\ndatapath: copy\nlimits: {{pairs_per_client: {self._most}}}\n"
            "listeners:\n"
            "- {name: main, bind: '127.0.0.1:0', rules: [&rule "
            "{match: instruction, allow: [loopback]}]}\n"
            "- {name: udp, bind: '127.0.0.1:0', protocol: udp, rules: [*rule]}\n"
        )

    def start(self, *names: str) -> None:
        """All of these share their limits when this returns."""
        for name in names:
            self.daemons[name] = self._start(self.config(name), instance=name)
            self.opened[name] = []
            if self._scope == "fleet":
                self.daemons[name].wait_for_line("fleet_limits_connected")

    def admits(self, name: str, client: str = CLIENT) -> bool:
        """Whether the machine serves one more connection of this client, which stays open."""
        sock = socket.create_connection(
            self.daemons[name].listeners()["main"], DEADLINE_S, source_address=(client, 0)
        )
        sock.sendall(instruction(address_text(self._server.address)))
        is_admitted = read_exactly(sock, 2) == ACK[:2]
        rest = (ACK if is_admitted else refusal("busy"))[2:]
        assert read_exactly(sock, len(rest)) == rest
        if is_admitted:
            self.opened[name].append(sock)
        else:
            sock.close()
        return is_admitted

    def fill(self, name: str, count: int) -> None:
        """Open so many there, of which none is refused."""
        assert [self.admits(name) for _ in range(count)] == [True] * count

    def close(self, name: str, count: int) -> None:
        """Reset so many of them; that machine has forgotten them when this returns."""
        for _ in range(count):
            reset(self.opened[name].pop())
        left = len(self.opened[name])
        wait_for(lambda: len(self.daemons[name].look()) == left, f"{left} are left")

    def wait_until_refused(self, name: str) -> None:
        """One more is refused there; what is admitted meanwhile is closed again."""

        def is_refused() -> bool:
            if not self.admits(name):
                return True
            self.close(name, 1)
            return False

        wait_for(is_refused, f"{name} refuses the client")

    def wait_until_admitted(self, name: str, *, deadline_s: float = DEADLINE_S) -> None:
        """One more is served there, and stays open."""
        wait_for(lambda: self.admits(name), f"{name} admits the client", deadline_s=deadline_s)

    def told(self, name: str) -> dict[str, int]:
        """What a machine says of pairs in the store."""
        text = self._etcd.ctl("get", "--print-value-only", f"/pyforwarder/edge/limits/{name}")
        found: dict[str, int] = json.loads(text)["tcp"] if text.strip() else {}
        return found

    def wait_until_told(self, name: str, count: int) -> None:
        """A machine says that the client has so many there."""
        wait_for(lambda: self.told(name).get(f"{CLIENT}/32", 0) == count, f"{name} tells {count}")

    def kill(self, name: str) -> None:
        """The machine is dead, and so are its connections."""
        self.daemons[name].kill()
        for sock in self.opened[name]:
            sock.close()
        self.opened[name].clear()

    def end(self) -> None:
        """Close everything."""
        for socks in self.opened.values():
            for sock in socks:
                sock.close()
        self._stack.close()
