"""Many verified transfers at once, through a forwarder or directly: transfers.c and its judge."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from tests.helpers.peers import address_text
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.netns import Network

BOTH_FIRST, CLIENT_FIRST, SERVER_FIRST = 0, 1, 2  # who sends its FIN first
# Nothing may stand still for longer. TCP's own recovery from three losses in a row of one packet
# takes 1.4 s, of a SYN 7 s.
STALL_MS: Final = 10_000
HEADER_BYTES: Final = 14 * 8  # struct header, in front of a client's bytes


@dataclass(frozen=True, slots=True)
class Line:
    """What one end said of one connection (see transfers.c)."""

    role: str
    number: int
    ending: str
    sent: int
    of_sent: int
    received: int
    of_received: int
    gap_us: int
    took_ms: int
    left_ms: int

    @property
    def is_whole(self) -> bool:
        """Everything was sent, everything came, and so did the end of file."""
        return (self.ending, self.sent, self.received) == ("eof", self.of_sent, self.of_received)


def compile_program(directory: Path) -> Path:
    """The program, made there."""
    program = directory / "transfers"
    source = Path(__file__).with_name("transfers.c")
    subprocess.run(
        ["clang", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True
    )
    return program


def _lines(output: IO[str]) -> list[Line]:
    output.seek(0)
    found = []
    for text in output:
        role, *rest = text.split()
        if role in ("client", "server"):
            number, ending, *numbers = rest
            found.append(Line(role, int(number), ending, *map(int, numbers)))
    return found


def _words(options: dict[str, int]) -> list[str]:
    return [f"{name}={value}" for name, value in {"stall": STALL_MS, **options}.items()]


class Clients:
    """A running `dial`."""

    def __init__(self, process: subprocess.Popen[str], output: IO[str], *, count: int) -> None:
        self.process = process
        self.count = count
        self._output = output

    def wait_until_held(self, *, deadline_s: float = 60.0) -> None:
        """Until all have come to where `hold` or `quiet` keeps them (or have ended)."""
        wait_for(self._is_held, "every connection held", deadline_s=deadline_s)

    def _is_held(self) -> bool:
        self._output.seek(0)
        return "held\n" in self._output or self.process.poll() is not None

    def lines(self) -> list[Line]:
        """What has been said so far."""
        return _lines(self._output)

    def go(self) -> None:
        """Those that are held go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def wait(self, *, deadline_s: float = 120.0) -> list[Line]:
        """All lines, once every connection has ended."""
        self.process.wait(timeout=deadline_s)
        return self.lines()


class Server:
    """A running `serve`."""

    def __init__(self, process: subprocess.Popen[str], output: IO[str]) -> None:
        self.process = process
        self._output = output
        self.port: int = wait_for(self._port, "the server listens")

    def _port(self) -> int:
        self._output.seek(0)
        first = self._output.readline()
        return int(first.split()[1]) if first.endswith("\n") else 0

    def lines(self) -> list[Line]:
        """What has been said so far."""
        return _lines(self._output)

    def wait(self, *, deadline_s: float = 60.0) -> list[Line]:
        """All lines, once every connection has ended; takes no more of them.

        Raises:
            AssertionError: some did not end.
        """
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the server still has connections; {len(self.lines())} have ended"
            ) from None
        return self.lines()


@dataclass(frozen=True, slots=True)
class Transfers:
    """The compiled program."""

    program: Path

    @contextlib.contextmanager
    def server(self, network: Network, **options: int) -> Iterator[Server]:
        """A server in that network, at all its addresses and a port of the kernel's choice."""
        with self._running(network, "serve", "0", *_words(options)) as (process, output):
            yield Server(process, output)

    @contextlib.contextmanager
    def clients(
        self,
        network: Network,
        count: int,
        *,
        to: tuple[str, int],
        via: tuple[str, int] | None,
        **options: int,
    ) -> Iterator[Clients]:
        """`count` connections to a server, through a forwarder or directly."""
        host, port = to if via is None else via
        destination = "-" if via is None else address_text(to)
        words = ("dial", host, str(port), destination, str(count), *_words(options))
        with self._running(network, *words) as (process, output):
            yield Clients(process, output, count=count)

    @contextlib.contextmanager
    def _running(
        self, network: Network, *words: str
    ) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
        # Into a file, not a pipe: nobody need read while it runs.
        with tempfile.NamedTemporaryFile("w+") as output:
            with network.entered(), open(output.name, "w") as writing:
                process = subprocess.Popen(
                    [str(self.program), *words], stdin=subprocess.PIPE, stdout=writing, text=True
                )
            try:
                yield process, output
            finally:
                process.kill()
                process.wait()
                with contextlib.suppress(OSError):  # what was not read by it
                    assert process.stdin is not None
                    process.stdin.close()


def faults(count: int, clients: Sequence[Line], servers: Sequence[Line]) -> list[str]:
    """What is wrong where every one of `count` connections should be whole; [] if nothing."""
    found = [f"{line}" for line in (*clients, *servers) if not line.is_whole]
    for name, lines in (("clients", clients), ("servers", servers)):
        numbers = sorted(line.number for line in lines)
        if len(lines) != count or len(set(numbers)) != count:
            found.append(f"{len(lines)} {name} with {len(set(numbers))} numbers, not {count}")
    return found


def totals(clients: Sequence[Line]) -> tuple[int, int]:
    """What whole connections have carried up and down, their headers included."""
    up = sum(line.sent + HEADER_BYTES for line in clients)
    return up, sum(line.received for line in clients)
