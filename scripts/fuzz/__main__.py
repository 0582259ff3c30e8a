"""Feeds `tests.helpers.fuzzing.examine` until the time is over, then prints what it took."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["pyforwarder"]):
    from tests.helpers.first_packets import TURNS
    from tests.helpers.fuzzing import FULL, LEAVES, Stopwatch, examine

# Instrumented code takes several times as long as usual.
WATCH: Final = Stopwatch(most_s=0.5)
# Inputs are made longer by `examine` where that matters.
MAX_BYTES: Final = 4096


def seeds(directory: Path) -> None:
    """What real clients sent, as each kind of input."""
    for name, turns in TURNS.items():
        data = b"".join(turns)[: MAX_BYTES - 16]
        for leaf in range(len(LEAVES)):
            (directory / f"matcher-{name}-{leaf}").write_bytes(bytes([2, leaf]) + data)
        for program in (b"\x04\x03\x00\x00\x01\x00\x10", b"\x04\x02\x06\x01\x00\x18\x00\x19"):
            (directory / f"rules-{name}-{len(program)}").write_bytes(program + data)
    headers = {
        "v1": b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n",
        "v2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\x83\x46\x3b\xc5",
        "token": b"FWD1 10.0.0.1:22 exp=1800000060 key=ops from=192.0.2.0/24 nonce=9F_a sig="
        + b"A" * 43,
    }
    for name, header in headers.items():
        (directory / f"header-{name}").write_bytes(b"\0" + header)
    for number, pattern in enumerate((b"^(a|b)*c", b"^[A-Z]{2,9} /", b"(?i)^\\x16.\\d+?[^x]")):
        (directory / f"pattern-{number}").write_bytes(b"\x01" + pattern + b"\0aababc")


class Target:
    """What the fuzzer calls; it ends the process when the time is over."""

    def __init__(self, seconds: int) -> None:
        self._started_s = time.monotonic()
        self._end_s = self._started_s + seconds
        self._told_s = self._started_s
        self._inputs = 0

    def __call__(self, data: bytes) -> None:
        now_s = time.monotonic()
        if now_s > self._end_s:
            self.report()
            sys.stdout.flush()
            os._exit(0)
        if now_s > self._told_s + 60:
            self._told_s = now_s
            print(f"{now_s - self._started_s:.0f} s: {self._inputs} inputs", flush=True)
        self._inputs += 1
        examine(data, WATCH)

    def report(self) -> None:
        """How many answers, and the slowest of each kind."""
        print(
            f"{self._inputs} inputs, {WATCH.calls} answers in "
            f"{time.monotonic() - self._started_s:.0f} s; the slowest answers, in ms:"
        )
        worst = sorted(WATCH.worst.items(), key=lambda item: -item[1][0])
        for name, (took_s, size) in worst[:15]:
            print(f"{took_s * 1e3:8.2f}  {size:6d} bytes  {name}")


def main() -> None:
    """`python -m fuzz SECONDS DIRECTORY`; inputs that fail go into the directory."""
    seconds, kept = int(sys.argv[1]), sys.argv[2]
    assert FULL > MAX_BYTES
    with tempfile.TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        words = [
            "-timeout=20",
            "-verbosity=0",
            f"-max_len={MAX_BYTES}",
            f"-artifact_prefix={kept}/",
        ]
        atheris.Setup([sys.argv[0], *words, corpus], Target(seconds))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
