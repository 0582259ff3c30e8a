"""Thousands of connections that go on, and how long each of them stands still: pauses.c."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyforwarder.runtime.slowness import scaled_s

# Longer than all that the program itself waits for.
_ENDS_WITHIN_S: Final = scaled_s(60.0)
PERCENTILES: Final = ("p50", "p90", "p99", "most")


@dataclass(frozen=True, slots=True)
class Report:
    """What was seen in a while; times are in ms."""

    faults: int
    kinds: dict[str, int]
    groups: dict[str, dict[str, Any]]

    def waits(self, group: str) -> dict[str, Any]:
        """The longest wait of each client of a group, or the wait of each new connection."""
        found = self.groups[group]
        waits: dict[str, Any] = found["longest" if found["clients"] else "turn"]
        return waits

    def longest_ms(self, group: str) -> float:
        """The p99 of `waits`."""
        value: float = self.waits(group)["p99"]
        return value

    def lines(self) -> Iterator[str]:
        """For people."""
        for name, group in self.groups.items():
            longest = " ".join(f"{group['longest'][key]:8.1f}" for key in PERCENTILES)
            turn = " ".join(f"{group['turn'][key]:7.1f}" for key in PERCENTILES)
            if group["clients"]:
                lost = f", {group['lost']} lost" if group["lost"] else ""
                yield (
                    f"{name:14} {group['clients']:5} clients, longest {longest}, "
                    f"of {group['turns']:6} turns {turn}{lost}"
                )
            else:
                yield f"{name:14} {group['done']:5} new connections, {turn}"
        yield f"{self.faults} faults {self.kinds or ''}"


def p99_of_all_ms(reports: Sequence[Report], group: str) -> float:
    """The p99 of all `waits` in all reports: a client is counted in each, with its longest."""
    counts: Counter[float] = Counter()
    for report in reports:
        for most_ms, count in report.waits(group)["buckets"]:
            counts[most_ms] += count
    left = counts.total() * 0.99
    for most_ms in sorted(counts):
        left -= counts[most_ms]
        if left < 0:
            longest_ms: float = max(report.waits(group)["most"] for report in reports)
            return min(most_ms, longest_ms)
    return 0.0


class Clients:
    """The running program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        ports = self._answer()
        self.tcp_port: int = ports["tcp"]
        self.udp_port: int = ports["udp"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it has ended with {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _order(self, *words: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def open(
        self,
        name: str,
        address: tuple[str, int],
        count: int,
        *,
        every_s: float,
        most_bytes: int,
        udp: bool = False,
    ) -> None:
        """So many clients; each asks something again so long after it was answered."""
        kind = "udp" if udp else "tcp"
        self._order("open", name, kind, *address, count, int(every_s * 1e6), most_bytes)

    def connect(self, name: str, address: tuple[str, int], per_s: float) -> None:
        """From now on so many new connections in a second."""
        self._order("connect", name, *address, per_s)

    def report(self) -> Report:
        """Since the last one."""
        return Report(**self._order("report"))

    def stop(self) -> Report:
        """All end in order; what was seen since the last report."""
        report = Report(**self._order("stop"))
        assert self._process.wait(_ENDS_WITHIN_S) == 0
        return report


@contextlib.contextmanager
def clients() -> Iterator[Clients]:
    """A server and no clients so far; all have ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="pauses-") as directory:
        program = Path(directory) / "pauses"
        source = Path(__file__).with_name("pauses.c")
        subprocess.run(
            ["clang", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True
        )
        process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            yield Clients(process)
        finally:
            process.kill()
            process.communicate()
