"""A daemon, and those that take its place one after the other."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pyforwarder.client import ControlClient
from pyforwarder.runtime.instance import Instance
from pyforwarder.supervisor.takeover.predecessor import Predecessor, find
from tests.helpers.daemon import COMMAND, START_DEADLINE_S
from tests.helpers.peers import dial, read_exactly
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder


def instance_of(daemon: Daemon) -> Instance:
    """Where the files of the daemon's instance are, also those of a successor."""
    return Instance.named(daemon.instance, daemon.place.environ())


def pid_of(daemon: Daemon) -> int:
    """The process that serves now, the daemon or a successor, as the file says."""
    return int(instance_of(daemon).pid_file.read_text())


@contextlib.contextmanager
def introduced(control: ControlClient) -> Iterator[Predecessor]:
    """As a successor that is this process, and ends after this block."""
    successor = find(lambda fd: control.request("succeed", fds_sent=[fd]))
    try:
        yield successor
    finally:
        successor.discard()


def echoes(address: tuple[str, int]) -> bool:
    """Whether a new connection is forwarded, to a server that echoes."""
    with dial(address) as sock:
        sock.sendall(b"hello")
        return read_exactly(sock, 5) == b"hello"


class Lineage:
    """A daemon, and those that come after it; all have ended after `end`."""

    def __init__(self, first: Daemon) -> None:
        self.first = first
        self.place = first.place
        self.instance = instance_of(first)
        self.first_ends_with = 0

    @property
    def pid(self) -> int:
        """Of the one that serves now."""
        return pid_of(self.first)

    def upgrade(self, *words: str, build: Sequence[str] = COMMAND) -> str:
        """Another takes its place, of another version where `build` runs that; what is said."""
        before = self.pid
        done = self.first.command("upgrade", *words, deadline_s=START_DEADLINE_S, build=build)
        assert done.returncode == 0, done.stderr
        assert self.pid != before
        return done.stderr

    def fail_to_upgrade(self, *words: str, build: Sequence[str] = COMMAND) -> str:
        """Another does not take its place; why not."""
        before = self.pid
        done = self.first.command("upgrade", *words, deadline_s=START_DEADLINE_S, build=build)
        assert done.returncode != 0
        assert self.pid == before
        return done.stderr

    def shown(self) -> Counter[str]:
        """How many pairs are joined, by datapath."""
        return Counter(row["datapath"] for row in self.first.look() if row["state"] == "joined")

    def offered(self) -> contextlib.AbstractContextManager[Predecessor]:
        """As a successor that is this process, and ends after this block."""
        return introduced(ControlClient(self.instance))

    def end(self) -> None:
        """`down --now`: nothing is left of any of them."""
        done = self.first.command("down", "--now")
        assert done.returncode == 0, done.stderr
        wait_for(lambda: not self.place.processes(), "all have ended")
        assert self.first.wait() == self.first_ends_with


@contextlib.contextmanager
def lineages(start_forwarder: StartForwarder) -> Iterator[Callable[[str], Lineage]]:
    """What starts the first of one, by its configuration; all have ended afterwards."""
    with contextlib.ExitStack() as stack:

        def start(config: str) -> Lineage:
            lineage = Lineage(start_forwarder(config))
            stack.callback(lineage.end)
            return lineage

        yield start
